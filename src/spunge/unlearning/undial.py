"""UNDIAL (Dong et al. 2024, arXiv 2402.10052, section 3.2): learn the base's outputs with the label's logit pushed down.

forget loss = mean over tokens of CE(model, softmax(base logits - beta * onehot(label)))
"""

import torch
from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain, passes_of
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class UNDIALSettings(OutputSettings):
    method: str = "undial"
    beta: float = Field(10.0, gt=0, description="How far the label's logit is pushed down.")


def unlearn(task: Task, settings: UNDIALSettings) -> Branch:
    """Distil the base with the forget samples' tokens made unlikely (self-distillation with adjusted logits)."""
    forget = forget_stream(task, settings)

    def loss(session: Session, batch: Batch) -> Tensor:
        base = session.reference.log_probabilities(forget, batch)
        return adjusted_distillation(session.outputs(batch), base, settings.beta)

    return descend(task, settings, loss, forget=forget, distributions=[forget])


def adjusted_distillation(scored: Scored, base: Tensor, beta: float) -> Tensor:
    """base: log-probabilities (n, v), which are its logits up to a constant a row -> scalar."""
    pushed = base.scatter_add(1, scored.labels[:, None], torch.full_like(base[:, :1], -beta))
    losses = torch.nn.functional.cross_entropy(scored.logits, pushed.softmax(-1), reduction="none")
    return losses.sum() / max(1, scored.labels.numel())


UNDIAL = Method(
    settings=UNDIALSettings,
    source="Dong et al. 2024, arXiv 2402.10052",
    unlearn=unlearn,
    passes=passes_of(1, reference=1),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    version=2,
)
