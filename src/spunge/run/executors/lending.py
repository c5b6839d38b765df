"""Processes that have nothing to make take batches of the judging that others are at.

The process that makes a stage offers its batches in a folder (`model.board`); another one holds the same model and computes some
of them. Whoever helps may be gone at any time: its batch alone is computed again.
"""

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from spunge.run.executors.channel import Help, Leave
from spunge.run.executors.executor import Given
from spunge.run.executors.making import Job
from spunge.temporary import TemporaryFolder

# Seconds that a stage is under way before others help: a shorter one would be over before they have loaded a model.
LENT_AFTER = 3.0
# Seconds that one who was asked to leave may be at its last batch: one that stands still is not waited for. It has nothing to lose.
LEAVES_WITHIN = 120.0


class Hears(Hashable, Protocol):
    """A process that messages can be sent to."""

    def send(self, message: Any) -> None: ...


P = TypeVar("P", bound=Hears)


@dataclass
class _Offered(Generic[P]):
    """A stage under way that others may help with."""

    job: Job
    title: str
    needs: tuple[str, ...]
    since: float
    helpers: dict[P, int] = field(default_factory=dict)  # process -> the number of its Help
    alone: bool = False  # one who helped failed or is gone: nobody is asked again

    @property
    def wants(self) -> bool:
        return not self.alone and time.monotonic() - self.since > LENT_AFTER


class Lending(Generic[P]):
    """Who helps with what."""

    def __init__(self) -> None:
        self._folder = TemporaryFolder("boards")
        self._offered: dict[Given, _Offered[P]] = {}
        self._number = 0
        self._asked: dict[P, tuple[int, float]] = {}  # to leave -> the number of the last Help, and since when

    def begin(self, given: Given, job: Job, title: str, needs: tuple[str, ...]) -> Job:
        """A stage is to be made that others may help with: the job of who makes it."""
        self._number += 1
        board = self._folder.path / str(self._number)
        board.mkdir()
        offered: _Offered[P] = _Offered(job._replace(board=board), title, needs, time.monotonic())
        self._offered[given] = offered
        return offered.job

    def end(self, given: Given) -> None:
        """A stage is made, or is not."""
        offered = self._offered.pop(given, None)
        for process, number in offered.helpers.items() if offered else ():
            self._ask(process, number)

    def helps(self, process: P) -> bool:
        return any(process in offered.helpers for offered in self._offered.values())

    def leave(self, process: P) -> None:
        """Have a process take no more batches, if it takes any."""
        for offered in self._offered.values():
            if (number := offered.helpers.pop(process, None)) is not None:
                self._ask(process, number)

    def _ask(self, process: P, number: int) -> None:
        process.send(Leave(number))
        self._asked[process] = number, time.monotonic()

    def left(self, process: P, number: int) -> None:
        """A process takes no more batches of what it was asked to help with."""
        if process in self._asked and self._asked[process][0] <= number:
            del self._asked[process]

    def leaves(self, process: P) -> bool:
        """Whether a process was asked to leave and is still at a batch."""
        return process in self._asked

    def stands_still(self, process: P) -> bool:
        """Whether it has been so for longer than a batch takes."""
        return process in self._asked and time.monotonic() - self._asked[process][1] > LEAVES_WITHIN

    def wanting(self) -> Given | None:
        """The stage that one more process is to help with: with the fewest who do; None where none is."""
        wanting = {given: len(offered.helpers) for given, offered in self._offered.items() if offered.wants}
        return min(wanting, key=lambda given: wanting[given], default=None)

    def lend(self, process: P, given: Given) -> tuple[str, ...]:
        """Have a process help; what the stage needs, whose model it will hold."""
        self._number += 1
        offered = self._offered[given]
        offered.helpers[process] = self._number
        process.send(Help(offered.job, self._number))
        return offered.needs

    def lost(self, process: P, why: str) -> None:
        """One who helped, if it did, does no more."""
        self._asked.pop(process, None)
        for offered in self._offered.values():
            if offered.helpers.pop(process, None) is not None:
                offered.alone = True
                logging.getLogger("spunge").warning(
                    "%s: a process that took some of its batches does so no more (%s); it goes on without",
                    offered.title,
                    why,
                )

    def close(self) -> None:
        self._folder.close()
