"""Measuring a model while it trains: `watch`."""

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from spunge.recipe.block import Strict
from spunge.recipe.evaluating import EvaluatorSettings, measured_by
from spunge.recipe.training import DescentSettings, MethodSettings

EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+) *epochs?")


class Beside(Strict):
    """A second metric, of what must be kept."""

    evaluation: str = Field(description="Name of an evaluation.")
    metric: str = Field(description="A metric that it measures.")
    subject: str | None = Field(
        None,
        description="One of its subjects. Default: its only one, or that of all rows; it cannot be a part to forget.",
    )
    share: float | None = Field(
        0.95,
        gt=0,
        description="With `keep: best`, steps count at which it keeps this share of the base's: value / base, or base / value "
        "where less is better. null: it is drawn, and decides nothing.",
    )


class Watch(Strict):
    """Measure every branch and control while it trains."""

    every: int | str = Field(
        description="Steps between two measurements, or epochs: `1 epoch`, `0.5 epochs`. Also before the first step and after the "
        "last."
    )
    evaluation: str = Field(
        description="Name of an evaluation. With `keep: best`, half of its items, of each subject, are for this; the other half "
        "alone is judged."
    )
    metric: str = Field(description="A metric that it measures.")
    subject: str | None = Field(
        None,
        description="One of its subjects. Default: the parts that the training unlearns, where it has them; else its only one, or "
        "that of all rows.",
    )
    limit: int | None = Field(
        64,
        ge=1,
        description="At most so many items of each subject, drawn at random: the same at every step. null: all.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="last: the weights after the last step, as without a watch. best: those of the measured step at which the "
        "metric is best, the earlier of equal ones.",
    )
    beside: Beside | None = Field(
        None,
        description="Another metric beside it, of what must be kept. With `keep: best`, the best step is chosen from those at "
        "which enough of it is kept.",
    )

    @field_validator("every")
    @classmethod
    def _steps_or_epochs(cls, every: int | str) -> int | str:
        """Steps as a number."""
        if isinstance(every, str) and (told := re.fullmatch(r"(\d+)(?: *steps?)?", every.strip())):
            every = int(told[1])
        if isinstance(every, str):
            told = EPOCHS.fullmatch(every.strip())
            if told is None or not float(told[1]):
                raise ValueError(f"{every!r} is neither steps nor epochs; give a number of steps, or such as `1 epoch`")
            return f"{float(told[1]):g} epoch{'' if float(told[1]) == 1 else 's'}"
        if every < 1:
            raise ValueError(f"{every}: give 1 step or more")
        return every

    @property
    def epochs(self) -> float | None:
        """Epochs between two measurements; None where these are steps."""
        told = EPOCHS.fullmatch(self.every) if isinstance(self.every, str) else None
        return float(told[1]) if told else None

    @property
    def evaluations(self) -> dict[str, str]:
        """Setting -> the evaluation that it names."""
        beside = {} if self.beside is None else {"watch.beside": self.beside.evaluation}
        return {"watch": self.evaluation, **beside}

    @property
    def share(self) -> float | None:
        """What must be kept of the metric beside where the best step is chosen; None where nothing must."""
        return self.beside.share if self.beside is not None and self.chooses else None

    @property
    def chooses(self) -> bool:
        """Whether a step is chosen by what is measured."""
        return self.keep == "best"


def refuse_watch(watch: Watch, evaluations: Mapping[str, EvaluatorSettings], unlearn: MethodSettings | None) -> None:
    """Raises ValueError for a watch of what does not train, or by what cannot be measured while it does."""
    if unlearn is None:
        raise ValueError("watch: nothing is unlearned, and there is no training to watch; leave it out")
    training: Strict = unlearn
    if not isinstance(training, DescentSettings):
        raise ValueError(f"watch: {unlearn.method!r} trains nothing, and there are no steps to watch; leave it out")
    if watch.epochs is not None and training.packing:
        raise ValueError(
            f"watch.every: {watch.every!r}: of packed texts an epoch's length is known too late; give steps"
        )
    for setting, name in watch.evaluations.items():
        generation = dict(measured_by(name, evaluations, setting)).get("generation")
        if generation is not None and dict(generation).get("engine") == "vllm":
            raise ValueError(
                f"{setting}.evaluation: {name!r} writes by vllm, which reads a checkpoint, and a model in training has none; name "
                "another, or set its generation.engine to transformers"
            )
