"""How a run goes, told to whoever listens: stages that begin and end, steps in between; in a terminal, a bar."""

import time
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

ERRORS = Console(stderr=True, highlight=False)


class Watcher(Protocol):
    """Hears how a run goes."""

    def begin(self, title: str) -> None: ...
    def step(self, done: int, total: int, note: str = "") -> None: ...
    def end(self, outcome: str) -> None: ...


class Silent:
    """Says nothing."""

    def begin(self, title: str) -> None:
        pass

    def step(self, done: int, total: int, note: str = "") -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


class Terminal:
    """A Watcher that shows progress on stderr; without a terminal, a plain line as each stage ends."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title = ""
        self._started = 0.0

    def begin(self, title: str) -> None:
        self._title, self._started = title, time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal)
        self._task = self._bar.add_task(escape(title), total=1, note="")
        self._bar.start()

    def step(self, done: int, total: int, note: str = "") -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=escape(note))

    def end(self, outcome: str) -> None:
        self.close()
        ERRORS.print(
            f"[dim]{time.perf_counter() - self._started:7.1f} s[/]  {escape(self._title)}: {escape(outcome)}",
            soft_wrap=True,
        )

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar:
            self._bar.stop()
            self._bar = None
