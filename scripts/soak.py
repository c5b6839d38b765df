"""Kill spunge at random moments, hundreds of times, and start it again until it is done: nothing is lost, repeated or different.

python scripts/soak.py --minutes 10            # `make soak`
python scripts/soak.py --kills 40 --seed 3 --kinds run folder
python scripts/soak.py --every folder delta    # killed at each write in turn, and finished

Whole toy runs, and merges of every output, are killed (SIGKILL) after a random time or before a random write, stopped by Ctrl-C
or SIGTERM once or twice, started twice at once. When one is done, what it left must be what an undisturbed one leaves, byte for
byte but for times, `spunge verify` must pass, and no temporary file may lie about. Prints the figures; exits 1 where one is not
0 that should be.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from forked import Child, Command, Ended, begun, call, content, differing, preload, remove, stamped, start
from toy_commands import commands

GO_ON = ("spunge: stopped; give the same command again to go on", "spunge: stopped at once; give the same command")
BUSY = "another process is at work in"
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


@dataclass
class Figures:
    """What was done, and what must stay 0."""

    seconds: float = 0.0
    finished: int = 0  # commands brought to their end
    kills: int = 0
    stops: int = 0  # by Ctrl-C or SIGTERM
    pairs: int = 0  # two processes on one folder
    lost: int = 0  # stages or tensors that were vouched for and no longer are
    repeated: int = 0  # stages or tensors made again though they were vouched for
    differing: int = 0  # finished commands that left something else than an undisturbed one
    tracebacks: int = 0
    wrong: int = 0  # exit codes or last lines that are not as promised
    told: list[str] = field(default_factory=list)

    def note(self, kind: str, said: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.told.append(f"{kind}: {said}")

    @property
    def bad(self) -> int:
        return self.lost + self.repeated + self.differing + self.tracebacks + self.wrong


@dataclass
class Trial:
    """One command in a folder of its own, disturbed until it is done."""

    command: Command
    folder: Path
    whole: dict[str, Any]
    chance: random.Random
    figures: Figures
    usual: float  # seconds that it takes undisturbed

    def disturbed(self, most: int) -> bool:
        """Disturb it so often at the most, then let it end; whether all is well."""
        bad = self.figures.bad
        for _ in range(most):
            ways = (
                self._killed,
                self._killed,
                self._killed_at_a_write,
                self._killed_at_a_write,
                self._stopped,
                self._pair,
            )
            if self._attempt(self.chance.choice(ways)):
                break
        else:
            self._attempt(lambda: start(self.command, self.folder).ended())
        self.check()
        return self.figures.bad == bad

    def _attempt(self, disturb: Callable[[], Ended | None]) -> bool:
        """Start it, disturb it, and see that it neither lost nor repeated anything; whether it is done."""
        before, said = stamped(self.command, self.folder), len(begun(self.folder))
        ended = disturb()
        assert ended is not None
        self._look(ended)
        gone = before - stamped(self.command, self.folder)
        if gone and (not self.command.is_merge or ended.code != 0):
            self.figures.note("lost", f"{self.command.kind}: {sorted(gone)} ({self.folder})")
        if again := before & set(begun(self.folder)[said:]):
            self.figures.note("repeated", f"{self.command.kind}: {sorted(again)} ({self.folder})")
        return ended.code == 0

    def _look(self, ended: Ended) -> None:
        """Whether it ended in a way that is promised."""
        if "Traceback" in ended.errors or "Exception ignored" in ended.errors:
            self.figures.note("tracebacks", f"{self.command.kind}: {ended.errors[-1500:]}")
            return
        told = ended.last.startswith(GO_ON) or not ended.errors  # it may not have begun
        early = ended.code == -signal.SIGTERM and not ended.errors
        if ended.code not in (0, -signal.SIGKILL) and not early and not (ended.code in (130, 143) and told):
            self.figures.note("wrong", f"{self.command.kind}: exit {ended.code}: {ended.last} ({self.folder})")

    def _killed(self) -> Ended | None:
        """By SIGKILL after a random time, sooner more often than later."""
        child = start(self.command, self.folder)
        ended = child.ended(self.usual * self.chance.random() ** 1.5)
        if ended is not None:
            return ended
        self.figures.kills += 1
        child.signal(signal.SIGKILL)
        return child.ended()

    def _killed_at_a_write(self) -> Ended | None:
        ended = self.killed_before(self.chance.randint(1, 30))
        self.figures.kills += ended.code == -signal.SIGKILL
        return ended

    def killed_before(self, number: int, by: int = signal.SIGKILL) -> Ended:
        """By a signal before the so many-th file is opened to write, renamed or removed."""
        return call(self.command, self.folder, lambda: _signal_before(number, by, str(self.folder)))

    def _stopped(self) -> Ended | None:
        """By Ctrl-C or SIGTERM, once or twice, at a random time or before a random write."""
        self.figures.stops += 1
        number = self.chance.choice([signal.SIGINT, signal.SIGTERM])
        if self.chance.random() < 0.5:
            return self.killed_before(self.chance.randint(1, 30), number)
        child = start(self.command, self.folder)
        ended = child.ended(0.02 + self.usual * self.chance.random())
        for pause in (0.0, self.chance.choice([0.0, 0.001, 0.02]))[: self.chance.randint(1, 2)]:
            ended = ended or child.ended(pause)
            if ended is None:
                child.signal(number)
        return ended or self._soon(child)

    def _soon(self, child: Child) -> Ended | None:
        """It must end within ten seconds of being asked."""
        ended = child.ended(10)
        if ended is None:
            self.figures.note("wrong", f"{self.command.kind}: goes on after a signal ({self.folder})")
            child.signal(signal.SIGKILL)
        return ended or child.ended()

    def _pair(self) -> Ended | None:
        """Two at once: one is refused. The other may be killed."""
        self.figures.pairs += 1
        first = start(self.command, self.folder)
        early = first.ended(0.5 * self.usual * self.chance.random())
        second = start(self.command, self.folder)
        if early is None and self.chance.random() < 0.3:
            self.figures.kills += 1
            first.signal(signal.SIGKILL)
        ended = [early or first.ended(), second.ended()]
        busy = [
            each
            for each in ended
            if each and each.code == 2 and BUSY in each.last and len(each.errors.splitlines()) < 9
        ]
        others = [each for each in ended if each and each not in busy]
        for each in others[:-1]:
            self._look(each)
        if not others:
            self.figures.note("wrong", f"{self.command.kind}: two at once refused each other ({self.folder})")
            return call(self.command, self.folder)
        return max(others, key=lambda each: each.code)

    def check(self) -> None:
        """The result is that of an undisturbed command, and vouched for."""
        self.figures.finished += 1
        if odd := differing(self.command, self.folder, self.whole):
            self.figures.note("differing", f"{self.command.kind}: {', '.join(odd[:5])} ({self.folder})")
        for run in self.command.runs(self.folder):
            checked = call(Command("verify", ("verify", run), run), self.folder)
            if checked.code:
                self.figures.note("differing", f"{self.command.kind}: verify says {checked.last} ({self.folder})")


def _signal_before(number: int, by: int, folder: str) -> None:
    """Let this process be signalled before its so many-th write below a folder."""
    count = itertools.count(1)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in WRITES
        if writes and _named(arguments[0]).startswith(folder) and next(count) == number:
            os.kill(os.getpid(), by)

    sys.addaudithook(hear)


def _named(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))


def every_write(trial: Trial, fresh: Callable[[], Path]) -> None:
    """Killed before each write in turn, each time in a new folder, and finished."""
    for number in itertools.count(1):
        trial.folder = fresh()
        if trial._attempt(lambda number=number: trial.killed_before(number)):  # type: ignore[misc]
            return
        trial.figures.kills += 1
        if not trial._attempt(lambda: call(trial.command, trial.folder)):
            trial.figures.note("wrong", f"{trial.command.kind}: did not end ({trial.folder})")
        trial.check()


def trials(known: dict[str, Command], place: Path, chance: random.Random, figures: Figures) -> Iterator[Trial]:
    """A command after the other, without end."""
    usual, whole = {}, {}
    for kind, command in known.items():
        ended = call(command, place / "again" / kind)
        usual[kind], whole[kind] = ended.seconds, content(command, place / "again" / kind)
    for number in itertools.count():
        for kind, command in known.items():
            yield Trial(command, place / f"{kind}-{number}", whole[kind], chance, figures, usual[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=10**9, help="stop after so many, if that is sooner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="*", default=[], help="run, run-npo, judge, search, folder, adapter, ...; all by default"
    )
    parser.add_argument("--every", nargs="*", default=[], help="kinds that are killed at each write in turn")
    parser.add_argument("--place", type=Path, default=None, help="where to work; a temporary folder by default")
    given = parser.parse_args()
    figures = Figures()
    place = Path(tempfile.mkdtemp(prefix="soak-", dir=given.place))
    known = {
        kind: each
        for kind, each in commands(place / "inputs").items()
        if kind in (given.kinds + given.every) or not given.kinds + given.every
    }
    preload(known, place / "whole")
    started = time.monotonic()
    stop = started + 60 * given.minutes
    for trial in trials(known, place, random.Random(given.seed), figures):
        if trial.command.kind in given.every:
            numbers = itertools.count()
            every_write(trial, lambda trial=trial, numbers=numbers: place / f"{trial.command.kind}-at-{next(numbers)}")  # type: ignore[misc]
            given.every.remove(trial.command.kind)
            if not given.every and not given.kinds:
                break
        elif trial.disturbed(12):
            remove(trial.folder)
        if time.monotonic() >= stop or figures.kills >= given.kills:
            break
    figures.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(figures), indent=2))
    if not figures.bad:
        shutil.rmtree(place)
    sys.exit(bool(figures.bad))


if __name__ == "__main__":
    main()
