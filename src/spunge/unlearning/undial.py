"""UNDIAL (Dong et al. 2024, arXiv 2402.10052, section 3.2): learn the base's outputs with the label's logit pushed down.

    forget loss = mean over tokens of CE(model, softmax(base logits - beta * onehot(label)))

beta 10 and learning rate 1e-4 are those of open-unlearning (locuslab/open-unlearning, read in November 2026). Its loss
has no retain term (`alpha: 0`) and averages over prompts and padding too; here alpha is 1 and the mean is over the learned tokens.
"""

import torch
from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import beside_base
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.scored import LogProbabilities, Scored
from spunge.unlearning.trained import stored_entries


class UNDIALSettings(OutputSettings):
    method: str = "undial"
    beta: float = Field(10.0, gt=0, description="How far the label's logit is pushed down.")


def unlearn(task: Task, settings: UNDIALSettings) -> Branch:
    """Distil the base with the forget samples' tokens made unlikely (self-distillation with adjusted logits)."""
    forget = forget_stream(task, settings)

    def loss(session: Session, batch: Batch) -> Tensor:
        base = session.distributions.log_probabilities(forget, batch)
        return adjusted_distillation(session.outputs(batch), base, settings.beta)

    return descend(task, settings, loss, forget=forget, distributions=[forget])


def adjusted_distillation(scored: Scored, base: LogProbabilities, beta: float) -> Tensor:
    """base: log-probabilities, which are its logits up to a constant a place -> scalar."""

    def loss(logits: Tensor, places: slice) -> Tensor:
        given = base(places)
        pushed = given.scatter_add(1, scored.labels[places][:, None], torch.full_like(given[:, :1], -beta))
        return torch.nn.functional.cross_entropy(logits, pushed.softmax(-1), reduction="none")

    return scored.mean_of(scored.each(loss))


UNDIAL = Method(
    settings=UNDIALSettings,
    source="Dong et al. 2024, arXiv 2402.10052",
    unlearn=unlearn,
    calls=beside_base,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
    version=3,
)
