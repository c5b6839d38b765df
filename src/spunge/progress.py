"""How work goes, told to whoever listens: stages that begin and end, steps in between. In a terminal, a bar; else lines.

A `Watcher` hears all of it. What only counts takes a `Steps`, which a watcher's `step` is.
"""

import time
from dataclasses import dataclass
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
    """Hears how work goes. Each stage begins, may count its steps, and ends unless it fails.

    Stages follow each other, but for those of several processes: a title that begins again while it is under way says that what
    comes next is told of that stage.
    """

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


@dataclass
class _Line:
    """A stage that is under way. started, said: seconds of a clock, when it began and was last told of."""

    task: TaskID
    started: float
    said: float


class Terminal:
    """A Watcher that shows progress on stderr; without a terminal, a plain line now and then and as each stage ends."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._lines: dict[str, _Line] = {}  # by title
        self._title = ""

    def begin(self, title: str) -> None:
        self._title = title
        if title in self._lines:
            return
        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(compact=True),
            )
            self._bars = Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal)
            self._bars.start()
        now = time.perf_counter()
        self._lines[title] = _Line(self._bars.add_task(printable(title), total=1, note=""), now, now)

    def step(self, done: int, total: int, note: str = "", /) -> None:
        line = self._lines.get(self._title)
        if self._bars is None or line is None:
            return
        self._bars.update(line.task, completed=done, total=total, note=printable(note))
        if not ERRORS.is_terminal and time.perf_counter() - line.said >= EVERY:
            line.said = time.perf_counter()
            self._print(line, f"{done}/{total} {note}".rstrip())

    def end(self, outcome: str) -> None:
        line = self._lines.pop(self._title)
        if not self._lines:
            self.close()
        elif self._bars is not None:
            self._bars.remove_task(line.task)
        self._print(line, outcome)

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._lines = None, {}

    def _print(self, line: _Line, said: str) -> None:
        """A line of the stage, as it is: what stands in a name is neither markup nor an emoji."""
        seconds = f"{time.perf_counter() - line.started:7.1f} s"
        ERRORS.print(
            Text.assemble((seconds, "dim"), "  ", one_line(f"{self._title}: {said}" if said else self._title)),
            soft_wrap=True,
        )
