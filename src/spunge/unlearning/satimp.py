"""SatImp (Yang et al. 2025, arXiv 2505.11953): gradient ascent whose tokens are weighted by saturation and by importance.

    forget loss = -mean over tokens of p^beta1 * (1 - p)^beta2 * NLL,   p = exp(-NLL), held constant in the gradient

p^beta1 leaves alone what is forgotten already (saturation), (1 - p)^beta2 what is sure whatever the subject (importance).

beta1 5, beta2 1 and alpha 0.1 are those of the authors' code in open-unlearning (locuslab/open-unlearning, read in November 2026).
No figure of the paper was measured again here.
"""

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import descending
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.trained import stored_entries


class SatImpSettings(OutputSettings):
    method: str = "satimp"
    beta1: float = Field(5.0, ge=0, description="Saturation: the larger, the less unlikely tokens count.")
    beta2: float = Field(1.0, ge=0, description="Importance: the larger, the less likely tokens count.")
    alpha: float = Field(0.1, ge=0, description="Weight of the retain term; 0 leaves it out.")


def unlearn(task: Task, settings: SatImpSettings) -> Branch:
    """Gradient ascent whose tokens count most where they are neither forgotten nor sure."""

    def loss(session: Session, batch: Batch) -> Tensor:
        return saturated_ascent(session.outputs(batch).losses(), settings.beta1, settings.beta2)

    return descend(task, settings, loss)


def saturated_ascent(losses: Tensor, beta1: float, beta2: float) -> Tensor:
    """NLL of each token, (n,) -> scalar."""
    known = -losses.detach()
    # 1 - exp(-NLL) of tokens that are all but sure keeps its digits so.
    weights = (beta1 * known).exp() * (-known.expm1()).clamp(min=0) ** beta2
    return -(weights * losses).sum() / max(1, losses.numel())


SATIMP = Method(
    settings=SatImpSettings,
    source="Yang et al. 2025, arXiv 2505.11953",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
)
