"""GA, gradient ascent (Jang et al. 2023, arXiv 2210.01504): minimise -NLL of the forget samples, token mean.

    spunge run RECIPE --set unlearn.method=ga

Nothing holds it back: it is the baseline that destroys the model when it runs for long. `stop: {}` ends it where the paper does,
see forgotten.py. With a retain term it is `graddiff`.
"""

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.forgotten import ForgettingStop, stop_of
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend
from spunge.unlearning.trained import stored_entries


class GASettings(OutputSettings):
    method: str = "ga"
    alpha: Literal[0] = Field(0, description="There is no retain term; graddiff has one.")
    learning_rate: float = Field(3e-5, gt=0, description="Of the optimizer.")
    stop: ForgettingStop | None = Field(
        None,
        description="End where the forget samples count as forgotten, by memorisation accuracy and extraction likelihood.",
    )


def unlearn(task: Task, settings: GASettings) -> Branch:
    """Raise the loss on the forget samples (gradient ascent)."""
    if settings.stop is None:
        return descend(task, settings, ascent)
    forget = forget_stream(task, settings)
    return descend(
        task, settings, ascent, forget=forget, stopping=partial(stop_of, task, settings, settings.stop, forget)
    )


def ascent(session: Session, batch: Batch) -> Tensor:
    """-NLL, the mean over the batch's scored tokens."""
    return -session.outputs(batch).mean()


GA = Method(
    settings=GASettings,
    source="Jang et al. 2023, arXiv 2210.01504",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    shares=True,
    version=3,
)
