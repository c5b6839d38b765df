"""This process makes the stages, one after the other.

execution: {kind: here}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field

from spunge.errors import RecipeError
from spunge.progress import Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.model import ModelSettings
from spunge.run.executors.executor import Event, Executor, Given
from spunge.run.executors.making import made
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run


class HereSettings(ExecutionSettings):
    kind: Literal["here"] = Field("here", description="This process, one stage after the other.")


class Here:
    """A team of one. What is given is made once it was told that it begins; an error that is not of the recipe is raised."""

    def __init__(self, begun: Run, watcher: Watcher) -> None:
        self.session = Session(begun.base, watcher)
        self._given: tuple[Run, Stage[Session]] | None = None
        self._begun = False

    @property
    def room(self) -> bool:
        return self._given is None

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        self._given, self._begun = (begun, stage), False

    def told(self) -> Event:
        assert self._given is not None
        begun, stage = self._given
        given = Given(begun.graph.folder, stage.name)
        if not self._begun:
            self._begun = True
            return Event(given)
        self._given = None
        self.session.turn_to(begun.base)
        try:
            return Event(given, done=made(begun.graph, stage, self.session))
        except RecipeError as error:
            return Event(given, error=error)

    def wound_down(self) -> Iterator[Event]:
        yield from ()


@contextmanager
def here(settings: HereSettings, begun: Run, watcher: Watcher) -> Iterator[Here]:
    """This process makes one stage after the other."""
    team = Here(begun, watcher)
    try:
        yield team
    finally:
        team.session.close()


def one(settings: HereSettings, model: ModelSettings) -> int:
    return 1


HERE = Executor(HereSettings, "spunge", one, here)
