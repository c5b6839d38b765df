"""How work goes, told to whoever listens: stages that begin and end, steps in between. In a terminal, a bar; else lines.

A `Watcher` hears all of it. What only counts takes a `Steps`, which a watcher's `step` is.
"""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from spunge.errors import one_line, printable

ERRORS = Console(stderr=True, highlight=False)
EVERY = 30.0  # seconds between two lines of one stage, where there is no terminal


class Steps(Protocol):
    """Hears how far a stage is: `done` of `total`, and what there is to say of it."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


class Watcher(Protocol):
    """Hears how work goes. Stages follow each other: each begins, may count its steps, and ends unless it fails."""

    def begin(self, title: str) -> None: ...
    def step(self, done: int, total: int, note: str = "", /) -> None: ...
    def end(self, outcome: str) -> None: ...


class Silent:
    """Says nothing."""

    def begin(self, title: str) -> None:
        pass

    def step(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


SILENT = Silent()


class Terminal:
    """A Watcher that shows progress on stderr; without a terminal, a plain line now and then and as each stage ends."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title = ""
        self._started = self._said = 0.0

    def begin(self, title: str) -> None:
        self._title, self._started = title, time.perf_counter()
        self._said = self._started
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal)
        self._task = self._bar.add_task(printable(title), total=1, note="")
        self._bar.start()

    def step(self, done: int, total: int, note: str = "", /) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=printable(note))
        if not ERRORS.is_terminal and time.perf_counter() - self._said >= EVERY:
            self._said = time.perf_counter()
            self._print(f"{done}/{total} {note}".rstrip())

    def end(self, outcome: str) -> None:
        self.close()
        self._print(outcome)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _print(self, said: str) -> None:
        """A line of the stage, as it is: what stands in a name is neither markup nor an emoji."""
        seconds = f"{time.perf_counter() - self._started:7.1f} s"
        ERRORS.print(
            Text.assemble((seconds, "dim"), "  ", one_line(f"{self._title}: {said}" if said else self._title)),
            soft_wrap=True,
        )
