"""NPO, negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * (NLL - NLL_base))

with the NLL summed over a sample's tokens. As beta goes to 0 its gradient becomes gradient ascent's.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from spunge.data.samples import Batch
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain, passes_of


class NPOSettings(OutputSettings):
    method: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")


class NPO:
    """Push the forget samples' likelihood below the base's, ever more gently (negative preference optimisation)."""

    Settings: ClassVar[type[OutputSettings]] = NPOSettings
    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2404.05868"
    needs_retain = staticmethod(needs_retain)
    version: ClassVar[int] = 1

    @staticmethod
    def passes(settings: NPOSettings, depth: int) -> float:
        return passes_of(settings, 1.0) + 1.0

    @staticmethod
    def unlearn(task: Task, settings: NPOSettings) -> Branch:
        forget = forget_stream(task, settings)

        def loss(session: Session, batch: Batch) -> Tensor:
            return negative_preference(
                session.outputs(batch).sums(), session.reference.sums(forget, batch), settings.beta
            )

        return descend(task, settings, loss, forget=forget, sums=[forget])


def negative_preference(losses: Tensor, base: Tensor, beta: float) -> Tensor:
    """Summed NLL of each sample under the model and the base, (b,), (b,) -> scalar."""
    return -(2 / beta) * logsigmoid(beta * (losses - base)).mean()
