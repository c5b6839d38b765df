"""PDU, primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314): flat logits, under a bound on the retain loss.

    minimise     forget loss = mean over tokens of (greatest logit - mean logit)^2
    subject to   retain loss <= (1 + tolerance) * the base's,   the NLL of the retain samples, token mean

by steps on gamma * forget loss + m * retain loss, with m, alpha at first, changed after every step:

    m <- max(0, m + dual_rate * (retain loss - (1 + tolerance) * the base's))

The bound of a step is that of its own retain samples, whose base's likelihoods are computed once.

The bound is as the paper proposes; the public code takes a number. The weight changes once an optimizer step, whatever the
accumulation. There is no warm-up of the weight: set `dual_rate: 0` for a run without it. The authors' runs (their fork of
open-unlearning) take gamma 1 and learning rate 1e-5, on TOFU alpha 100, step 5, bound 0.3 and 5 epochs of warm-up, on MUSE
alpha 50, step 1, bounds 0.1 to 1.5 and 3 epochs; alpha 1 and the tolerance here are ours. The public code flattens the logits
at questions and padding too, here at the learned tokens. `gru` is refused: it has no use for the weight. No figure of the paper
was measured again here.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.batches import learned_tokens, share
from spunge.unlearning.calls import FORGET, RETAIN, Group
from spunge.unlearning.feed import retain_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, Term, descend, retained_of
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class PDUSettings(OutputSettings):
    method: str = "pdu"
    alpha: float = Field(1.0, ge=0, description="Weight of the retain term at the first step.")
    tolerance: float = Field(0.1, ge=0, description="Share of the base's retain loss by which it may rise.")
    dual_rate: float = Field(
        1.0, ge=0, description="How much the weight changes with each nat above or below the bound."
    )
    retain_loss: Literal["nll"] = Field("nll", description="What is bounded: the retain samples' NLL.")

    @model_validator(mode="after")
    def _weighed_by_itself(self) -> "PDUSettings":
        if self.gru is not None:
            raise ValueError("gru: pdu weighs its retain term by how far that is above its bound; leave gru out")
        return self


def unlearn(task: Task, settings: PDUSettings) -> Branch:
    """Flatten the logits on the forget samples, weighing the retain samples as much as their bound asks for (primal-dual)."""
    retain = retain_stream(task, settings, retained_of(task))

    def loss(session: Session, batch: Batch) -> Tensor:
        return flatness(session.outputs(batch))

    def bounded(session: Session, held: Batch) -> Term:
        base = float(session.base_sums(retain, held).sum()) / max(1, held.learned)
        kept = session.outputs(held).mean()
        level, counted = float(kept.detach()), share(held, learned_tokens)
        weight = multiplier(session, settings)
        # All processes have one weight, so what is above the bound is that of all their samples.
        [above] = task.base.ranks.means([counted * (level - (1 + settings.tolerance) * base)])
        session.memory["above"] += [float(session.step), above]
        return Term(kept * counted, level, weight, {"multiplier": weight})

    return descend(
        task, settings, loss, retain=retain, retain_term=bounded, sums=[retain], remembered=["above", "multipliers"]
    )


def multiplier(session: Session, settings: PDUSettings) -> float:
    """The retain term's weight in the step under way, given how far each batch of the steps before was above the bound."""
    values, above = session.memory["multipliers"], session.memory["above"]
    if not values:
        values.append(settings.alpha)
    if len(values) <= session.step:
        last = [excess for step, excess in zip(above[::2], above[1::2], strict=True) if step == session.step - 1]
        values.append(max(0.0, values[-1] + settings.dual_rate * sum(last) / len(last)))
    return values[session.step]


def flatness(scored: Scored) -> Tensor:
    """Scalar, 0 where all logits are equal at every place."""
    return scored.mean_of(scored.each(lambda logits, _: (logits.amax(-1) - logits.mean(-1)).square()))


def calls(settings: PDUSettings, _depth: int) -> list[Group]:
    return [(FORGET._replace(beside=True),), (RETAIN._replace(gradient=False, once=True),), (RETAIN,)]


PDU = Method(
    settings=PDUSettings,
    source="Entesari et al. 2025, arXiv 2506.05314",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    needs_retain=lambda settings: True,
    shares=True,
    through=True,
)
