"""What an executor is: whoever makes the stages that are ready. It decides nothing but where and how many at once.

The schedule (`run.schedule`) says which stage is ready, writes its stamp and tells people; an executor's team is given stages and
tells how far they are. So a run's files are the same whoever makes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from spunge.progress import Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.model import ModelSettings
from spunge.recipe.schema import Recipe
from spunge.registry import summary_of
from spunge.run.graph import Stage
from spunge.run.session import Session, Used
from spunge.run.stages.building import Run
from spunge.run.stamps import FileMark

S = TypeVar("S", bound=ExecutionSettings)


class Given(NamedTuple):
    """A stage that a team was given: of several runs, by the run's folder."""

    folder: Path
    stage: str


class Done(NamedTuple):
    """A stage was made, and its files are whole."""

    marks: Mapping[str, FileMark]
    outcome: str  # for the person who watches
    seconds: float
    used: Used


class Event(NamedTuple):
    """What a team tells of a stage: how far it is (step, of, note), that it was made, or why it was not; with none of these, that
    its work begins, which is after what makes it was started."""

    given: Given
    step: tuple[int, int, str] | None = None
    done: Done | None = None
    error: Exception | None = None


class Team(Protocol):
    """Those who make the stages of a run, or of several runs one after the other."""

    @property
    def session(self) -> Session:
        """What light stages are made with, in this process."""

    @property
    def room(self) -> bool:
        """Whether one more stage can be given now."""

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        """Have a stage made, of which all that it needs is done."""

    def told(self) -> Event:
        """The next event, waited for; KeyboardInterrupt where a stop was asked for."""

    def wound_down(self) -> Iterator[Event]:
        """Stop in order: what trains keeps its state. The last events."""


@dataclass(frozen=True)
class Executor(Generic[S]):
    """The first line of `team`'s docstring is what lists say of it."""

    settings: type[S]
    source: str
    # How many stages at once. Raises RecipeError where this machine, or its packages, cannot do what the settings ask for.
    at_once: Callable[[S, ModelSettings], int]
    team: Callable[[S, Run, Watcher], AbstractContextManager[Team]]
    # How many processes train one model together, each with a share of its weights.
    together: Callable[[S, ModelSettings], int] = lambda settings, model: 1
    refuse: Callable[[Recipe], None] = lambda recipe: None  # raises RecipeError for what its teams cannot make
    # Both of these on a machine that is not this one; None where the settings leave it to the machine.
    elsewhere: Callable[[S, ModelSettings], tuple[int, int] | None] = lambda settings, model: None
    version: int = 1

    def room(self, recipe: Recipe) -> int:
        """How many stages of a recipe are made at once. Raises RecipeError where they cannot be made."""
        self.refuse(recipe)
        settings: Any = recipe.execution
        return self.at_once(settings, recipe.model)

    def planned(self, recipe: Recipe, elsewhere: bool) -> tuple[int, int]:
        """How many stages are made at once, and how many processes train one model together. elsewhere: not on this machine."""
        settings: Any = recipe.execution
        if elsewhere and (there := self.elsewhere(settings, recipe.model)) is not None:
            self.refuse(recipe)
            return there
        return self.room(recipe), self.together(settings, recipe.model)

    @property
    def summary(self) -> str:
        return summary_of(self.team)
