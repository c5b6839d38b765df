"""EUL (Chen & Yang 2023, arXiv 2310.20150): unlearning layers, taught by the base on what is kept and away from it on what is not.

    loss = gamma * (-KL(base || model) - language * NLL) on forget + alpha * (KL(base || model) + task * NLL) on retain

All are means over the learned tokens: the selective teacher-student term, the language modelling loss on the forget samples,
negated, and the task's loss on the retain samples. What is trained are the unlearning layers that `model.unlearning_layers`
gives the base, bottlenecks after each block's feed-forward network, and nothing else:

    model: {path: ..., unlearning_layers: {}}
    unlearn: {method: eul}
    merge: {rule: regmean, alpha: 1}

This merge is the paper's fusion, W = (sum X_i^T X_i)^-1 sum X_i^T X_i W_i with X_i a layer's inputs on part i, for both
projections; X_i^T X_i is a mean over tokens here, so that parts of different sizes count alike. Other rules merge the layers as
they merge any weights.

Neither the paper's text nor code with its losses could be read here (github.com/SALT-NLP/Efficient_Unlearning trains adapters and
has no loss of its own): the terms are those that it is known by. Ours are the direction of the divergences, which is that of the
other methods here, the weights 1, the loss of the next token where encoders have a masked one, no biases, the bottleneck's width,
and its beginning: `up` is 0, so that the base is itself. Both forget terms have no bound: `max_damage` ends what goes too far.
No figure of the paper was measured again here.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.errors import RecipeError
from spunge.recipe.training import Selected, Trainable
from spunge.unlearning.batches import learned_tokens, share
from spunge.unlearning.calls import beside_base
from spunge.unlearning.feed import forget_stream, retain_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, Term, descend, divergence, needs_retain, retained_of
from spunge.unlearning.trained import stored_entries
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.unlearning_layers import INSIDE

LAYERS = Selected(match=[f"*.{INSIDE}.*"])


class EULSettings(OutputSettings):
    method: str = "eul"
    language: float = Field(
        1.0, ge=0, description="Weight of the negated NLL of the forget samples, within the forget term."
    )
    task: float = Field(1.0, ge=0, description="Weight of the NLL of the retain samples, within the retain term.")
    retain_loss: Literal["kl"] = Field("kl", description="The divergence of the outputs from the base's.")
    trainable: Trainable = Field(
        default=LAYERS,
        description="What is trained. Default: the layers that `model.unlearning_layers` gives the base.",
    )


def unlearn(task: Task, settings: EULSettings) -> Branch:
    """Train unlearning layers to match the base on the retain samples and to leave it on the forget samples."""
    forget = forget_stream(task, settings)
    retain = retain_stream(task, settings, retained_of(task)) if settings.alpha else None

    def loss(session: Session, batch: Batch) -> Tensor:
        base = session.distributions.log_probabilities(forget, batch)
        own = session.outputs(batch)
        return -divergence(own, base) - settings.language * own.mean()

    def kept(session: Session, held: Batch) -> Term:
        assert retain is not None
        base = session.distributions.log_probabilities(retain, held)
        own = session.outputs(held)
        apart = divergence(own, base)
        total = apart + settings.task * own.mean()
        return Term(total * share(held, learned_tokens), apart.detach(), settings.alpha)

    return descend(task, settings, loss, forget=forget, retain=retain, retain_term=kept, distributions=[forget])


def refuse_base(settings: EULSettings, base: Checkpoint) -> None:
    """Raises RecipeError where the base has none of the layers that are to be trained."""
    if settings.trainable == LAYERS and not any(f".{INSIDE}." in name for name in base.tensors):
        raise RecipeError(
            "unlearn.method: eul trains unlearning layers, and the base has none; set model.unlearning_layers to {}, or "
            "unlearn.trainable to what is to be trained in their place"
        )


EUL = Method(
    settings=EULSettings,
    source="Chen & Yang 2023, arXiv 2310.20150",
    unlearn=unlearn,
    calls=beside_base,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    refuse_base=refuse_base,
)
