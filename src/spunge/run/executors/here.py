"""This process makes the stages, one after the other.

execution: {kind: here}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field

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
    """A team of one. A stage that fails raises its error at once."""

    def __init__(self, begun: Run, watcher: Watcher) -> None:
        self.session = Session(begun.base, watcher)
        self._made: list[Event] = []

    @property
    def room(self) -> bool:
        return not self._made

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        self.session.turn_to(begun.base)
        self._made.append(Event(Given(begun.graph.folder, stage.name), done=made(begun.graph, stage, self.session)))

    def told(self) -> Event:
        return self._made.pop()

    def wound_down(self) -> Iterator[Event]:
        yield from self._made


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
