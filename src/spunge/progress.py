"""How work goes, told to whoever listens: stages that begin and end, steps in between. In a terminal, one display; else lines.

A `Watcher` hears all of it. What only counts takes a `Steps`, which a watcher's `step` is.
"""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spunge.errors import one_line, printable

ERRORS = Console(stderr=True, highlight=False)
EVERY = 30.0  # seconds between two lines of one stage, where there is no terminal
WAITING = 4  # stages that are still to come, in the display
WIDE = 24  # columns of a bar

Kind = Literal["model", "disk"]


class Steps(Protocol):
    """Hears how far a stage is: `done` of `total`, and what there is to say of it."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


class Expected(NamedTuple):
    """A stage that is to come. amount: of its work, in the same unit for all of its kind; inf where that is not known yet."""

    title: str
    kind: Kind
    amount: float


class Watcher(Protocol):
    """Hears how work goes: the stages that are to come, and each as it begins, counts its steps, and ends unless it fails.

    Stages follow each other, but for those of several processes: a title that begins again while it is under way says that what
    comes next is told of that stage.
    """

    def expect(self, stages: Sequence[Expected], /) -> None: ...
    def begin(self, title: str) -> None: ...
    def step(self, done: int, total: int, note: str = "", /) -> None: ...
    def end(self, outcome: str) -> None: ...


class Silent:
    """Says nothing."""

    def expect(self, stages: Sequence[Expected], /) -> None:
        pass

    def begin(self, title: str) -> None:
        pass

    def step(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


SILENT = Silent()


@dataclass
class Stage:
    """A stage that is under way. Times: seconds of a clock."""

    title: str
    started: float
    said: float  # when a line last told of it
    done: int = 0
    total: int = 0  # 0: it has not counted yet
    note: str = ""
    first: tuple[float, int] | None = (
        None  # when its first steps were told, and how many: it may go on from earlier ones
    )

    def left(self, now: float) -> float | None:
        """Seconds until its end, as fast as its steps were so far; None where they do not tell."""
        if self.first is None or self.done <= self.first[1]:
            return None
        return (now - self.first[0]) / (self.done - self.first[1]) * (self.total - self.done)

    def share(self) -> float:
        return self.done / self.total if self.total else 0.0


@dataclass
class Board:
    """The stages of a run: those to come, under way and done."""

    waiting: dict[str, Expected] = field(default_factory=dict)  # by title
    under_way: dict[str, Stage] = field(default_factory=dict)
    finished: int = 0  # of those that were expected
    _known: dict[str, Expected] = field(default_factory=dict)
    _spent: dict[Kind, tuple[float, float]] = field(default_factory=dict)  # seconds, amount of what is done

    def expect(self, stages: Sequence[Expected]) -> None:
        self.waiting = {stage.title: stage for stage in stages}
        self._known = dict(self.waiting)
        self.finished = 0

    @property
    def count(self) -> int:
        """All that was expected."""
        return len(self._known)

    def begin(self, title: str, now: float) -> Stage:
        """The stage, which may be under way already."""
        self.waiting.pop(title, None)
        return self.under_way.setdefault(title, Stage(title, now, now))

    def step(self, title: str, now: float, done: int, total: int, note: str) -> Stage | None:
        stage = self.under_way.get(title)
        if stage is not None:
            stage.done, stage.total, stage.note = done, total, note
            stage.first = stage.first or (now, done)
        return stage

    def end(self, title: str, now: float) -> Stage:
        stage = self.under_way.pop(title)
        if (known := self._known.get(title)) is not None:
            self.finished += 1
            seconds, amount = self._spent.get(known.kind, (0.0, 0.0))
            self._spent[known.kind] = seconds + now - stage.started, amount + known.amount
        return stage

    def left(self, now: float) -> float | None:
        """Seconds until all that was expected is done; None until some work of each kind that is left tells how long it takes.

        What is left is shared out among as many as are at work now.
        """
        spent = dict(self._spent)
        rest: dict[Kind, float] = {}
        ends = [0.0]
        for stage in list(self.under_way.values()):
            if (known := self._known.get(stage.title)) is not None:
                seconds, amount = spent.get(known.kind, (0.0, 0.0))
                spent[known.kind] = seconds + now - stage.started, amount + known.amount * stage.share()
                rest[known.kind] = rest.get(known.kind, 0.0) + known.amount * (1 - stage.share())
            ends.append(stage.left(now) or 0.0)
        for waits in list(self.waiting.values()):
            rest[waits.kind] = rest.get(waits.kind, 0.0) + waits.amount
        if any(amount and not spent.get(kind, (0.0, 0.0))[1] for kind, amount in rest.items()):
            return None
        if not all(math.isfinite(amount) for amount in rest.values()):
            return None
        total = sum(amount * spent[kind][0] / spent[kind][1] for kind, amount in rest.items() if amount)
        return max(*ends, total / max(1, len(self.under_way)))


class Terminal:
    """A Watcher that shows progress on stderr: in a terminal, all stages in one display; else a plain line now and then, also of a
    stage that says nothing, and as each ends."""

    def __init__(self) -> None:
        self._board = Board()
        self._title = ""
        self._live: Live | None = None
        self._closed = threading.Event()
        self._closed.set()
        self._lock = threading.RLock()

    def expect(self, stages: Sequence[Expected], /) -> None:
        with self._lock:
            self._board.expect(stages)
            if stages:  # they are shown while what makes them is started
                self._open()

    def begin(self, title: str) -> None:
        with self._lock:
            self._title = title
            self._board.begin(title, time.perf_counter())
            self._open()

    def _open(self) -> None:
        """The display; or, where there is no terminal, what writes lines."""
        if ERRORS.is_terminal and self._live is None:
            self._live = Live(
                console=ERRORS,
                transient=True,
                get_renderable=self.display,
                refresh_per_second=4,
                redirect_stdout=False,
            )
            self._live.start()
        elif not ERRORS.is_terminal and self._closed.is_set():
            self._closed = threading.Event()
            threading.Thread(target=self._lines, args=(self._closed,), daemon=True).start()

    def step(self, done: int, total: int, note: str = "", /) -> None:
        with self._lock:
            now = time.perf_counter()
            stage = self._board.step(self._title, now, done, total, note)
            if stage is not None and not ERRORS.is_terminal and now - stage.said >= EVERY:
                self._say(stage, now)

    def end(self, outcome: str) -> None:
        with self._lock:
            now = time.perf_counter()
            stage = self._board.end(self._title, now)
            if not (self._board.under_way or self._board.waiting):
                self.close()
            self._print(stage, now, outcome)

    def close(self) -> None:
        """Take the display off the screen."""
        if self._live is not None:
            self._live.stop()
        self._live = None
        self._closed.set()
        self._board = Board()

    def _lines(self, closed: threading.Event) -> None:
        """Now and then a line of each stage that has had none for long: some work does not count its steps."""
        while not closed.wait(EVERY / 4):
            with self._lock:
                now = time.perf_counter()
                for stage in self._board.under_way.values():
                    if not closed.is_set() and now - stage.said >= EVERY:
                        self._say(stage, now)

    def _say(self, stage: Stage, now: float) -> None:
        """How far a stage is, and what is left."""
        stage.said = now
        counted = f"{stage.done}/{stage.total} {stage.note}".rstrip() if stage.total else "at work"
        left = [(stage.left(now), "left"), (self._board.left(now) if self._board.count else None, "of the run left")]
        self._print(
            stage, now, ", ".join([counted, *(f"{clock(each)} {what}" for each, what in left if each is not None)])
        )

    def _print(self, stage: Stage, now: float, said: str) -> None:
        """A line of the stage, as it is: what stands in a name is neither markup nor an emoji."""
        seconds = f"{now - stage.started:7.1f} s"
        ERRORS.print(
            Text.assemble((seconds, "dim"), "  ", one_line(f"{stage.title}: {said}" if said else stage.title)),
            soft_wrap=True,
        )

    def display(self) -> Table:
        """The stages under way, the next ones, and how far the whole run is. A thread of rich calls it that holds its own lock:
        it waits for none of ours."""
        now, board, wide = time.perf_counter(), self._board, WIDE if ERRORS.width >= 100 else WIDE // 3
        lines = Table.grid(padding=(0, 2, 0, 0))
        for told_whole in (False, True, True, False, True):  # where all is too long, titles and notes are wrapped
            lines.add_column(overflow="fold", no_wrap=told_whole)
        under_way, waiting = list(board.under_way.values()), list(board.waiting)
        for stage in under_way:
            bar = ProgressBar(stage.total or None, stage.done, wide, pulse=not stage.total, animation_time=now)
            counted = f"{stage.done}/{stage.total}" if stage.total else ""
            note = Text(printable(stage.note))
            lines.add_row(Text(printable(stage.title)), bar, counted, note, _left(stage.left(now)))
        for title in waiting[:WAITING]:
            lines.add_row(Text(printable(title), style="dim"), "", Text("waits", style="dim"))
        if (more := len(waiting) - WAITING) > 0:
            lines.add_row(Text(f"and {more} more", style="dim"))
        if board.count:
            bar = ProgressBar(board.count, board.finished + sum(stage.share() for stage in under_way), wide)
            counted = f"{board.finished}/{board.count}"
            lines.add_row(Text("the run", style="bold"), bar, counted, "stages", _left(board.left(now)))
        return lines


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """0:42, 12:05, 3:07:00: what is left is no more certain than that."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
