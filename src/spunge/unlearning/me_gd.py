"""ME+GD, maximum entropy (Yuan et al. 2025, arXiv 2410.08109): make the forget samples' tokens a guess among all tokens.

    mode paper:  forget loss = mean over tokens of KL(model || uniform) = log V - H(model),   V tokens in the vocabulary
    mode code:   forget loss = mean over tokens of KL(uniform || model), which is what the authors' public code computes

GD is the retain term `nll`.

The authors' form is minimal at even outputs too, with another gradient. Their TOFU runs count the questions' tokens too: for
that give `text` rows. gamma 0.1 is theirs. No figure of the paper was measured again here.
"""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import FORGET, descending
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries

Mode = Literal["paper", "code"]


class MEGDSettings(OutputSettings):
    method: str = "me_gd"
    mode: Mode = Field("paper", description="paper: the outputs' entropy; code: the divergence from uniform outputs.")
    gamma: float = Field(0.1, ge=0, description="Weight of the forget term.")


def unlearn(task: Task, settings: MEGDSettings) -> Branch:
    """Make the outputs on the forget samples as even as they can be (maximum entropy)."""

    def loss(session: Session, batch: Batch) -> Tensor:
        return unevenness(session.outputs(batch), settings.mode)

    return descend(task, settings, loss)


def unevenness(scored: Scored, mode: Mode) -> Tensor:
    """Scalar, 0 where all tokens are equally likely at every place."""

    def loss(logits: Tensor, _places: slice) -> Tensor:
        most = math.log(logits.shape[-1])
        if mode == "code":
            return logits.logsumexp(-1) - logits.mean(-1) - most
        logs = logits.log_softmax(-1)
        return (logs.exp() * logs).sum(-1) + most

    return scored.mean_of(scored.each(loss))


ME_GD = Method(
    settings=MEGDSettings,
    source="Yuan et al. 2025, arXiv 2410.08109",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings, (FORGET._replace(beside=True),)),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
)
