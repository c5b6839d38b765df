"""GA, gradient ascent (Jang et al. 2023, arXiv 2210.01504): minimise -NLL of the forget samples, token mean.

    spunge run RECIPE --set unlearn.method=ga

Nothing holds it back: it is the baseline that destroys the model when it runs for long. With a retain term it is
`graddiff`.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, passes_of


class GASettings(OutputSettings):
    method: Literal["ga"] = "ga"
    alpha: Literal[0] = Field(0, description="There is no retain term; graddiff has one.")
    learning_rate: float = Field(3e-5, gt=0, description="Of AdamW.")


class GA:
    """Raise the loss on the forget samples (gradient ascent)."""

    Settings: ClassVar[type[OutputSettings]] = GASettings
    source: ClassVar[str] = "Jang et al. 2023, arXiv 2210.01504"
    needs_retain: ClassVar[bool] = False
    version: ClassVar[int] = 1

    @staticmethod
    def passes(settings: GASettings, depth: int) -> float:
        return passes_of(settings, 1.0)

    @staticmethod
    def unlearn(task: Task, settings: GASettings) -> Branch:
        return descend(task, settings, ascent)


def ascent(session: Session, batch: Batch) -> Tensor:
    """-NLL, the mean over the batch's scored tokens."""
    return -session.outputs(batch).mean()
