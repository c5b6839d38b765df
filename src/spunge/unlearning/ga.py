"""GA, gradient ascent (Jang et al. 2023, arXiv 2210.01504): minimise -NLL of the forget samples, token mean.

Nothing holds it back: it is the baseline that destroys the model when it runs for long. With a retain term it is `graddiff`.

`stop: {}` ends it as Jang et al. do: once memorisation accuracy (share of tokens that are the likeliest) and extraction
likelihood (share of 10-grams of what the model writes after each prefix that stand in the rest), means over the first `rows`
forget samples, are no greater than the base's on as many retain rows, which stand for unseen text. `accuracy` and `extraction`
give limits instead. Rows of at most `n` learned tokens have no extraction likelihood. It is looked at once an epoch, or every
`every` steps; to look writes a continuation for each prefix of each sample, unless the accuracy is too high still.
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
    look = partial(stop_of, task, settings, settings.stop, forget)
    return descend(task, settings, ascent, forget=forget, stopping=lambda _session: look())


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
    through=True,
    version=3,
)
