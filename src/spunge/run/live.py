"""How far a run is, in its folder: RUN/progress.json while a command is at work there, for `spunge view` and others who look.

It is no result: nothing depends on it, and where it cannot be written the run goes on.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, redacted
from spunge.files import write_text
from spunge.progress import Board, Expected, Watcher

FILE = "progress.json"
EVERY = 1.0  # seconds between two writings while a stage counts its steps
LISTED = 100  # stages that are still to come


class _Live:
    """A watcher that writes what it hears, and hands it on."""

    def __init__(self, file: Path, watcher: Watcher) -> None:
        self._file, self._watcher = file, watcher
        self._board = Board()
        self._title = ""
        self._begun = time.time()
        self._written = float("-inf")

    def expect(self, stages: Sequence[Expected], /) -> None:
        self._board.expect(stages)
        self._watcher.expect(stages)

    def begin(self, title: str) -> None:
        self._title = title
        self._board.begin(title, time.monotonic())
        self._write()
        self._watcher.begin(title)

    def step(self, done: int, total: int, note: str = "", /) -> None:
        now = time.monotonic()
        self._board.step(self._title, now, done, total, note)
        if now - self._written >= EVERY:
            self._write()
        self._watcher.step(done, total, note)

    def end(self, outcome: str) -> None:
        self._board.end(self._title, time.monotonic())
        self._watcher.end(outcome)

    def _write(self) -> None:
        now = self._written = time.monotonic()
        with suppress(RecipeError, OSError):
            write_text(self._file, redacted(json.dumps(self._content(now), ensure_ascii=False)))

    def _content(self, now: float) -> dict[str, Any]:
        board = self._board
        return {
            "schema": 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": self._begun,  # seconds since 1970
            "written": time.time(),
            "finished": board.finished,
            "count": board.count,
            "left": board.left(now) if board.count else None,  # seconds
            "stages": [
                {
                    "title": stage.title,
                    "done": stage.done,
                    "total": stage.total,
                    "note": stage.note,
                    "seconds": round(now - stage.started, 1),
                    "left": stage.left(now),
                }
                for stage in board.under_way.values()
            ],
            "waiting": list(board.waiting)[:LISTED],
        }


@contextmanager
def told_in(folder: Path, watcher: Watcher) -> Iterator[Watcher]:
    """Inside the block the watcher that is given tells `folder` too how far the run is."""
    try:
        yield _Live(folder / FILE, watcher)
    finally:
        with suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)
