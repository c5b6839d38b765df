"""WGA, weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): tokens the model is sure of count most.

    forget loss = -mean over tokens of p^beta * NLL,   p = exp(-NLL), held constant in the gradient

Compared with the code of open-unlearning (locuslab/open-unlearning, read in November 2026).
"""

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import descending
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.trained import stored_entries


class WGASettings(OutputSettings):
    method: str = "wga"
    beta: float = Field(1.0, ge=0, description="0 is gradient ascent; the larger, the less unlikely tokens count.")


def unlearn(task: Task, settings: WGASettings) -> Branch:
    """Gradient ascent whose tokens are weighted by their own likelihood."""

    def loss(session: Session, batch: Batch) -> Tensor:
        return weighted_ascent(session.outputs(batch).losses(), settings.beta)

    return descend(task, settings, loss)


def weighted_ascent(losses: Tensor, beta: float) -> Tensor:
    """NLL of each token, (n,) -> scalar."""
    return -((-losses.detach()).exp() ** beta * losses).sum() / max(1, losses.numel())


WGA = Method(
    settings=WGASettings,
    source="Wang et al. 2025, arXiv 2502.19301",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
    version=3,
)
