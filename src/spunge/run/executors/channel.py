"""What a process that makes stages says to the one that gives them out, and hears from it, over a pipe between the two."""

import copy
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from spunge.errors import LostError, first_line
from spunge.files import file_of
from spunge.progress import Expected
from spunge.run.executors.executor import Done

EVERY = 0.1  # seconds between two steps that are told


class Ready(NamedTuple):
    """The process has imported what it needs."""


class Begun(NamedTuple):
    """The work on a stage begins."""


class Step(NamedTuple):
    done: int
    total: int
    note: str


class Said(NamedTuple):
    """A line of a log."""

    logger: str
    level: int
    text: str


class Failed(NamedTuple):
    """A stage was not made. trace: Python's own traceback, which no pickled error holds."""

    error: Exception
    trace: str


class Stopped(NamedTuple):
    """It was asked to stop, and did."""


class Help(NamedTuple):
    """Take batches of a stage that another process makes, until a Leave of this number or a later one. job: that stage."""

    job: Any
    number: int


class Leave(NamedTuple):
    """Take no more batches."""

    number: int


class Left(NamedTuple):
    """It takes no more batches of the stage that the Help of this number was for."""

    number: int


class GaveUp(NamedTuple):
    """It takes no more batches, because of an error that costs the stage nothing."""

    error: str


class Stop(NamedTuple):
    """Stop in order."""


Message = Ready | Begun | Step | Said | Failed | Stopped | Done | Left | GaveUp


class ElsewhereError(Exception):
    """Where an error came up, in another process."""


class Speaker:
    """Sends messages, one at a time, whichever thread has one."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a message is half sent: what interrupts it would leave the other side with half a message."""
        return self._lock.locked()

    def say(self, message: Any) -> None:
        with self._lock:
            self._pipe.send(message)


class Telling:
    """A watcher that sends when a stage begins and its steps, these not too often. Its end is told where it is given out."""

    def __init__(self, say: Callable[[Begun | Step], None], every: float = EVERY) -> None:
        self._say, self._every = say, every
        self._stepped = 0.0

    def expect(self, stages: Sequence[Expected], /) -> None:
        pass

    def begin(self, title: str) -> None:
        self._say(Begun())

    def step(self, done: int, total: int, note: str = "", /) -> None:
        now = time.monotonic()
        if done == total or now - self._stepped >= self._every:
            self._stepped = now
            self._say(Step(done, total, note))

    def end(self, outcome: str) -> None:
        pass


class Forward(logging.Handler):
    """Sends what is logged, for the other process to log it as its own."""

    def __init__(self, say: Callable[[Said], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(Said(record.name, record.levelno, record.getMessage()))


def failure(error: BaseException) -> Failed:
    """An error as it can be sent: with the file that it is about, and as a line of its own where its class cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, OSError) and error.errno is not None and (file := file_of(error)) is not None:
        error.filename = str(file)
    try:
        ForkingPickler.dumps(error)
        sent = copy.copy(error)  # which makes it anew, as the other process will
    except Exception:
        sent = error
    if sent is error or not isinstance(sent, Exception) or str(sent) != str(error):
        sent = LostError(f"{type(error).__name__}: {first_line(error)} (SPUNGE_TRACEBACK=1 shows where)")
    return Failed(sent, trace)


def raisable(failed: Failed) -> Exception:
    """The error, caused by what happened in the other process."""
    failed.error.__cause__ = ElsewhereError(f"in another process:\n{failed.trace}")
    return failed.error
