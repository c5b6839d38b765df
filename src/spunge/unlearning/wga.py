"""WGA, weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): tokens the model is sure of count most.

forget loss = -mean over tokens of p^beta * NLL,   p = exp(-NLL), held constant in the gradient
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain, passes_of


class WGASettings(OutputSettings):
    method: Literal["wga"] = "wga"
    beta: float = Field(1.0, ge=0, description="0 is gradient ascent; the larger, the less unlikely tokens count.")


class WGA:
    """Gradient ascent whose tokens are weighted by their own likelihood."""

    Settings: ClassVar[type[OutputSettings]] = WGASettings
    source: ClassVar[str] = "Wang et al. 2025, arXiv 2502.19301"
    needs_retain = staticmethod(needs_retain)
    version: ClassVar[int] = 1

    @staticmethod
    def passes(settings: WGASettings, depth: int) -> float:
        return passes_of(settings, 1.0)

    @staticmethod
    def unlearn(task: Task, settings: WGASettings) -> Branch:
        def loss(session: Session, batch: Batch) -> Tensor:
            return weighted_ascent(session.outputs(batch).losses(), settings.beta)

        return descend(task, settings, loss)


def weighted_ascent(losses: Tensor, beta: float) -> Tensor:
    """NLL of each token, (n,) -> scalar."""
    return -((-losses.detach()).exp() ** beta * losses).sum() / max(1, losses.numel())
