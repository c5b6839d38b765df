"""One case of a target: what it may end in, how long it may take, how much memory it may hold."""

import contextlib
import random
import resource
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError

SECONDS = 5  # of CPU, for one case
IDLE = 60  # seconds of waiting, for one case
SPARE = 64 << 20  # bytes beside three times the input: buffers of a few MB that readers take whatever they read


@dataclass(frozen=True)
class Target:
    """Something that takes what others wrote.

    make: a case by chance. call: (folder to write into, case) -> bytes of the case's input. It raises RecipeError for what is
    refused, and AssertionError where what it took is not what an oracle takes. cases: how many `make test` tries.
    """

    name: str
    make: Callable[[random.Random], Any]
    call: Callable[[Path, Any], int]
    cases: int


class HangError(BaseException):
    """A case that does not end. No Exception, so that no code under test takes it for an error of its own."""


class GreedyError(AssertionError):
    """A case that held more memory than it may."""


def tried(target: Target, folder: Path, case: Any) -> str:
    """`taken` or `refused`. Raises what is a finding."""
    with _ending():
        try:
            target.call(folder, case)
        except RecipeError as error:
            check_message(str(error))
            return "refused"
    return "taken"


def tried_in_memory(target: Target, folder: Path, case: Any) -> str:
    """The same, with the memory that the process takes meanwhile. Linux alone tells it."""
    before = _peak(reset=True)
    size = 0
    try:
        with _ending():
            try:
                size = target.call(folder, case)
                return "taken"
            except RecipeError as error:
                check_message(str(error))
                return "refused"
    finally:
        held = _peak() - before
        if held > SPARE + 3 * size and sys.exc_info()[0] is None:
            raise GreedyError(f"{held >> 20} MB held for {size} bytes")


def check_message(message: str) -> None:
    """One line, under 300 characters, that a terminal shows and does not obey."""
    assert message.strip(), "an empty message"
    assert len(message) < 300, f"{len(message)} characters: {message!r}"
    odd = [each for each in message if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp")]
    assert not odd, f"{odd[0]!r} in {message!r}"


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise HangError(f"{SECONDS} s of CPU" if number == signal.SIGPROF else f"{IDLE} s")

    before = [signal.signal(each, stop) for each in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, IDLE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(each, handler)


def _peak(reset: bool = False) -> int:
    """The most memory in bytes that the process has held, since the last reset where the system can forget it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
