"""A copy of the base that is trained further on some samples, for methods that look at what it has learned."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from pydantic import Field

from spunge.errors import RecipeError
from spunge.recipe.block import Strict
from spunge.recipe.training import DescentSettings, Everything, LoRA, Selected
from spunge.unlearning.feed import total_steps
from spunge.unlearning.finetuning import FinetuningSettings, fitting
from spunge.unlearning.method import Task
from spunge.unlearning.trained import Trained, training, training_mode


class Further(Strict):
    """How a copy is trained further; all else is as the model's own training has it."""

    epochs: float = Field(3.0, gt=0, description="Passes over each part's samples.")
    learning_rate: float = Field(1e-4, gt=0, description="Of the optimizer.")


class Trains(Protocol):
    """Settings of a training that say what is trained."""

    @property
    def trainable(self) -> LoRA | Selected | Everything: ...


def further_steps(settings: Trains, how: Further, rows: Mapping[str, int]) -> int:
    """Optimizer steps in which a copy is trained further on parts of so many samples."""
    return sum(_settings(settings, how).steps_of(rows).values())


def _settings(settings: Trains, how: Further) -> FinetuningSettings:
    own = {each: vars(settings)[each] for each in (*DescentSettings.model_fields, "max_lengths", "max_damage")}
    return FinetuningSettings(**own | dict(how) | {"steps": None})


@contextmanager
def trained_further(task: Task, settings: Trains, how: Further, name: str, stage: str, steps: int) -> Iterator[Trained]:
    """Inside the block the base is trained further on a task's samples, from the factors that the model's own training begins with.

    name: of the method's setting that is `how`. stage: what is told meanwhile; where the task has a state, the copy has one of its
    own of this name. steps: of the model's own training. Raises RecipeError where the copy's goes wrong.
    """
    told = _settings(settings, how)

    def progress(step: int, of: int, note: str = "") -> None:
        task.progress(0, steps, f"{stage}, step {step} of {of}: {note}")

    state = task.state.with_name(f"{task.state.stem}-{stage}{task.state.suffix}") if task.state else None
    first = replace(task, log=None, state=state, progress=progress, watch=None)
    with training(task.base, settings.trainable, task.seed, task.setting, common=task.common) as trained:
        loop = fitting(first, told, trained, total_steps(first, told))
        # All other settings of this training, which errors name, are the model's own.
        loop.rate_setting = f"{task.setting}.{name}.learning_rate"
        with training_mode(trained.model):
            history = loop.run()
        if history.stopped is not None:
            raise RecipeError(
                f"{loop.rate_setting}: {told.learning_rate:g}: {history.stopped.partition(';')[0]}; lower it"
            )
        yield trained
