"""RR, representation rerouting (Zou et al. 2024, circuit breakers, arXiv 2406.04313, algorithm 1).

    reroute = mean over tokens of the samples to forget and over `layers` of ReLU(cos(h, h_base))
    retain  = mean over retain tokens and over all layers of |h - h_base|
    loss    = gamma * (1 - t / 2T) * reroute + alpha * t / 2T * retain     at step t of T, from 1

h: the hidden states after a block. Every token of a sample counts, prompts too, as in the authors' code
(github.com/GraySwanAI/circuit-breakers), which takes all layers for the retain term where the paper's algorithm names none.
Its layers 10 and 20 are places in the list that begins with the embeddings: the states after the blocks 9 and 19, counted from 0.

The authors train LoRA up to block 20 alone; here all blocks have it. Their mean of the retain term is over padding and the
embeddings too, here over tokens and blocks. At the base neither term has a slope, so rounding chooses the first step, there as
here: on another machine the delta is another one. gamma and alpha 10 are the published ones for 7B models and 150 steps.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity

from spunge.data.samples import Batch
from spunge.model.architecture import blocks_named, find_blocks, noted
from spunge.recipe.training import LoRA, Trainable
from spunge.unlearning.batches import share
from spunge.unlearning.calls import FORGET, RETAIN
from spunge.unlearning.feed import total_steps
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, Term, descend, needs_retain
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class RRSettings(OutputSettings):
    method: str = "rr"
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Blocks, counted from 0, whose hidden states are turned away from the base's. Default: those at a third and "
        "at two thirds of the depth: 9 and 19 of 32, the paper's layers 10 and 20.",
    )
    gamma: float = Field(10.0, ge=0, description="Weight of the forget term, which falls by half over the steps.")
    alpha: float = Field(10.0, ge=0, description="Weight of the retain term, of which it has half at the last step.")
    retain_loss: Literal["states"] = Field(  # type: ignore[assignment]
        "states", description="The retain term is the method's own: the distance of the hidden states from the base's."
    )
    # The authors' adapter. Its output is 0 at first, with dropout or without: the states begin at the base's own.
    trainable: Trainable = Field(
        default=LoRA(rank=16, targets="all-linear", dropout=0.05), description="What is trained."
    )


def unlearn(task: Task, settings: RRSettings) -> Branch:
    """Turn hidden states of the forget samples away from the base's, and keep those of the retain samples (circuit breakers)."""
    blocks = find_blocks(task.base.model)
    layers, every = layers_of(settings, len(blocks), task.setting), range(len(blocks))
    steps = total_steps(task, settings)

    def weight_of(session: Session) -> float:
        return (session.step + 1) / (2 * steps)

    def loss(session: Session, batch: Batch) -> Tensor:
        after, before, _ = states_of(session, batch, layers)
        return (1 - weight_of(session)) * rerouted(after, before, batch.mask)

    def retained(session: Session, batch: Batch) -> Term:
        after, before, _ = states_of(session, batch, every)
        moved = distance(after, before, batch.mask)
        return Term(
            moved * share(batch, tokens),
            squared_share([state.detach() for state in after], before, batch.mask),
            settings.alpha * weight_of(session),
        )

    return descend(task, settings, loss, over=tokens, retain_term=retained)


def layers_of(settings: RRSettings, depth: int, setting: str = "unlearn") -> list[int]:
    """Raises RecipeError for a block that the model has not."""
    chosen = settings.layers or sorted({max(0, round(depth * share) - 1) for share in (10 / 32, 20 / 32)})
    return blocks_named(chosen, depth, f"{setting}.layers")


def tokens(batch: Batch) -> float:
    return float(batch.mask.sum())


class Beside(NamedTuple):
    """Hidden states (b, t, d) after some blocks, of the trained model and of the base, and the trained model's outputs."""

    after: list[Tensor]
    before: list[Tensor]
    outputs: Scored


def states_of(session: Session, batch: Batch, layers: Sequence[int]) -> Beside:
    """What the trained model makes of a batch beside the base."""
    with noted(session.task.base.model, layers) as last:
        base_outputs(session.trained, batch, in_one=True)
        before = [last[layer] for layer in layers]
        scored = session.outputs(batch, in_one=True)
        return Beside([last[layer] for layer in layers], before, scored)


def rerouted(states: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Scalar: mean over tokens and layers of ReLU(cos). Each state (b, t, d); mask: (b, t), 1 at tokens."""
    turned = [
        (cosine_similarity(one.float(), other.float(), dim=-1).relu() * mask).sum()
        for one, other in zip(states, base, strict=True)
    ]
    total: Tensor = sum(turned[1:], turned[0]) / (mask.sum() * len(turned))
    return total


def distance(states: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Scalar: mean over tokens and layers of the distance from the base's states."""
    far = [
        (vector_norm(one.float() - other.float(), dim=-1) * mask).sum() for one, other in zip(states, base, strict=True)
    ]
    total: Tensor = sum(far[1:], far[0]) / (mask.sum() * len(far))
    return total


def squared_share(states: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> float:
    """Squared distance of all layers' states from the base's, as a share of these states' squares: the damage, as RMU's."""
    wide = mask.unsqueeze(-1)
    pairs = [(one.float() * wide, other.float() * wide) for one, other in zip(states, base, strict=True)]
    moved = sum(float((one - other).square().sum()) for one, other in pairs)
    return moved / max(sum(float(other.square().sum()) for _, other in pairs), 1e-30)


RR = Method(
    settings=RRSettings,
    source="Zou et al. 2024, arXiv 2406.04313",
    unlearn=unlearn,
    calls=lambda settings, depth: [
        (FORGET._replace(gradient=False, blocks=depth), FORGET._replace(blocks=depth)),
        *([(RETAIN._replace(gradient=False, blocks=depth), RETAIN._replace(blocks=depth))] if settings.alpha else []),
    ],
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    version=2,
)
