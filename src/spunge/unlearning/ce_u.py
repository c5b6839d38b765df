"""CE-U, cross-entropy unlearning (Yang 2025, arXiv 2503.01224): learn one's own outputs with the label left out.

    forget loss = mean over tokens of CE(model, softmax(logits with the label's at minus infinity)), the target held constant

The label's logit falls by its whole probability at each step and the others rise in proportion, so the gradient neither
vanishes where the model is sure nor explodes where it is not, and no base is asked.

No retain term (`alpha: 0`), as published; `alpha` adds one. For TOFU the author leaves the first token of each answer out; here
every token counts. No figure of the paper was measured again here.
"""

import torch
from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import FORGET, descending
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class CEUSettings(OutputSettings):
    method: str = "ce_u"
    alpha: float = Field(0.0, ge=0, description="Weight of the retain term; 0 leaves it out, as the paper does.")


def unlearn(task: Task, settings: CEUSettings) -> Branch:
    """Distil the model into itself with the forget samples' tokens left out (cross-entropy unlearning)."""

    def loss(session: Session, batch: Batch) -> Tensor:
        return label_left_out(session.outputs(batch))

    return descend(task, settings, loss)


def label_left_out(scored: Scored) -> Tensor:
    """Scalar."""

    def loss(logits: Tensor, places: slice) -> Tensor:
        target = logits.detach().scatter(1, scored.labels[places][:, None], -torch.inf).softmax(-1)
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    return scored.mean_of(scored.each(loss))


CE_U = Method(
    settings=CEUSettings,
    source="Yang 2025, arXiv 2503.01224",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings, (FORGET._replace(beside=True),)),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
)
