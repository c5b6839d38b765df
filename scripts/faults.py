"""Let the disk refuse every write of a run and of a merge in turn: one line says it, nothing half-written is believed.

python scripts/faults.py                             # `make faults`: every kind of command, every fault
python scripts/faults.py --kinds delta --faults full
python scripts/faults.py --minutes 1 --seed 2        # some of them, drawn

A library made from faults.c is loaded before libc. It counts the calls on files below a folder, and lets one of them fail, or it
and all that follow. Each time the command must end with one line that names a path and the cause, `spunge status` must not trip
over what is left, and the same command must go on to the bytes of an undisturbed one once the disk gives in.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from forked import Command, Ended, call, content, differing, preload, remove
from toy_commands import commands

SHIM = "SPUNGE_FAULTS"  # set in the process that has it loaded
CREATE, WRITE, RENAME, SYNC, REMOVE, READ, LOCK, OPEN = (1 << place for place in range(8))
EVERY = (1 << 8) - 1
PASSING = re.compile(
    r"[0-9a-f]{8}\.part|tmp\w{8}|state-[0-9a-f]{12}|#\d+|-[0-9a-f]{16}|[0-9a-f]{32,64}|[0-9a-f]{12}\.json"
)
ALIKE = re.compile(r"asia|europe|branch-\w+|seeds/\d+/|stamps/.*\.json")


class Fault(NamedTuple):
    calls: int  # the kinds of calls that fail
    error: int
    on: bool  # all later ones fail too
    inputs: bool = False  # also below the folder of the models and rows


FAULTS = {
    "full": Fault(CREATE | WRITE | RENAME | SYNC, errno.ENOSPC, True),
    "write-error": Fault(WRITE | RENAME | SYNC, errno.EIO, False),
    "read-error": Fault(READ | OPEN, errno.EIO, False, True),
    "read-only": Fault(CREATE | RENAME | REMOVE, errno.EROFS, True),
    "forbidden": Fault(CREATE | RENAME | REMOVE, errno.EACCES, False),
    "no-locks": Fault(LOCK, errno.ENOLCK, True),
}


class Called(NamedTuple):
    """A call that may fail: its number among those that may, its name and the file."""

    number: int
    name: str
    path: str

    @property
    def alike(self) -> str:
        """The same for the same call on a file of the same role."""
        return f"{self.name} {ALIKE.sub('*', PASSING.sub('*', self.path))}"


class Case(NamedTuple):
    command: Command
    fault: Fault
    called: Called  # the call that is to fail


@dataclass
class Figures:
    seconds: float = 0.0
    faults: int = 0
    missed: int = 0  # calls that did not come this time
    refused: int = 0  # commands that ended with a line
    harmless: int = 0  # commands that ended well all the same, such as where only the cache could not be written
    tracebacks: int = 0
    unclear: int = 0  # lines without path or cause
    misled: int = 0  # `spunge status` or `spunge verify` tripped over what was left, or believed it
    differing: int = 0  # the same command then ended otherwise than an undisturbed one
    told: list[str] = field(default_factory=list)

    def note(self, kind: str, said: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.told.append(f"{kind}: {said}")

    @property
    def bad(self) -> int:
        return self.tracebacks + self.unclear + self.misled + self.differing


def armed(fault: Fault, number: int, place: Path, folder: Path, log: int = -1) -> Callable[[], None]:
    """What lets the so many-th call fail in a process (0: none, they are only logged)."""
    below = place if fault.inputs else folder

    def arm() -> None:
        ctypes.CDLL(None).faults_arm(
            f"{below}/".encode(), fault.calls, fault.error, ctypes.c_long(number), int(fault.on), log
        )

    return arm


class Logged(NamedTuple):
    kind: int
    name: str
    path: str  # below the place


def logged(command: Command, place: Path, folder: Path) -> list[Logged]:
    """The calls that a command makes, undisturbed."""
    log = place / f"{command.kind}.calls"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    call(command, folder, armed(Fault(EVERY, 0, False, True), 0, place, folder, handle))
    os.close(handle)
    lines = (line.split(" ", 3) for line in log.read_text(errors="replace").splitlines())
    return [Logged(int(kind), name, path) for _number, kind, name, path in lines]


def calls_of(calls: list[Logged], fault: Fault, folder: str) -> Iterator[Called]:
    """Those that a fault is of, of each role the first and the last. folder: of the command, below the place."""
    own = [each for each in calls if each.kind & fault.calls and (fault.inputs or each.path.startswith(f"{folder}/"))]
    made = [Called(number, each.name, each.path.removeprefix(f"{folder}/")) for number, each in enumerate(own, 1)]
    made = [each for each in made if not each.path.startswith((f"{folder}-log/", "faults"))]
    first = {each.alike: each for each in reversed(made)}
    last = {each.alike: each for each in made}
    yield from sorted({*first.values(), *last.values()})


def tried(case: Case, place: Path, folder: Path, whole: dict[str, Any], figures: Figures) -> None:
    """Let one call fail, look at what is said and left, and let the same command go on."""
    command, fault, called = case
    hit = place / f"{folder.name}.hit"
    handle = os.open(hit, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ended = call(command, folder, armed(fault, called.number, place, folder, handle))
    os.close(handle)
    line = hit.read_text(errors="replace").partition("\n")[0].split(" ", 2)[-1]
    figures.faults += bool(line)
    figures.missed += not line
    bad, where = figures.bad, f"{command.kind}, {errno.errorcode[fault.error]} at {line}"
    _look(ended, fault, figures, where, hit=bool(line))
    made = ended.code == 0 or not differing(
        command, folder, whole
    )  # all of it is there where the last look at the base fails
    for run in command.runs(folder):
        finished = made or run != command.out  # of a search one run is in the making
        for name, codes in (("status", (0, 2)), ("verify", (0, 1, 2) if finished else (1, 2))):
            told = call(Command(name, (name, run), run), folder)
            if told.code not in codes or "Traceback" in told.errors:
                figures.note("misled", f"{where}: {name} {run} exits {told.code}: {told.last}")
    again = call(command, folder)
    odd = differing(command, folder, whole)
    if again.code or odd:
        figures.note("differing", f"{where}: exits {again.code}, {odd[:4]}: {again.last[:300]}")
    if figures.bad == bad:
        remove(folder)


def _look(ended: Ended, fault: Fault, figures: Figures, where: str, hit: bool) -> None:
    if "Traceback" in ended.errors or "Exception ignored" in ended.errors:
        figures.note("tracebacks", f"{where}: {ended.errors[-700:]}")
    elif ended.code == 0:
        figures.harmless += hit
    else:
        figures.refused += 1
        cause = os.strerror(fault.error) in ended.last or (fault.error == errno.ENOSPC and "is full" in ended.last)
        if ended.code not in (1, 2) or not cause or "'" not in ended.last or "SPUNGE_TRACEBACK" in ended.last:
            figures.note("unclear", f"{where}: exits {ended.code}: {ended.last}")


def _loaded(place: Path) -> None:
    """Start again with the library loaded."""
    library = place / "faults.so"
    source = Path(__file__).with_name("faults.c")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("faults: there is no C compiler (gcc)")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl", "-lpthread"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), SHIM: str(place)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def cases_of(
    known: dict[str, Command], faults: list[str], place: Path, whole: dict[str, dict[str, Any]]
) -> Iterator[Case]:
    """Every fault of every call of the commands. Fills in what undisturbed ones leave."""
    for kind, command in known.items():
        folder = place / "again" / kind
        calls = logged(command, place, folder)
        whole[kind] = content(command, folder)
        for name in faults:
            for called in calls_of(calls, FAULTS[name], f"again/{kind}"):
                yield Case(command, FAULTS[name], called)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="*", default=[], help="run, run-npo, judge, search, folder, adapter, ...; all by default"
    )
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long; the calls are drawn then")
    parser.add_argument("--most", type=int, default=10**9, help="faults that are tried; they are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, default=None, help="where to work; a temporary folder by default")
    given = parser.parse_args()
    if SHIM not in os.environ:
        _loaded(Path(tempfile.mkdtemp(prefix="faults-", dir=given.place)))
    place, figures = Path(os.environ[SHIM]), Figures()
    known = {kind: each for kind, each in commands(place / "inputs").items() if kind in given.kinds or not given.kinds}
    preload(known, place / "whole")
    started = time.monotonic()
    whole: dict[str, dict[str, Any]] = {}
    cases = list(cases_of(known, given.faults, place, whole))
    random.Random(given.seed).shuffle(cases)
    for number, case in enumerate(cases[: given.most]):
        if time.monotonic() - started > 60 * given.minutes:
            break
        tried(case, place, place / f"at-{number}", whole[case.command.kind], figures)
    figures.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(figures), indent=2))
    if not figures.bad:
        shutil.rmtree(place)
    sys.exit(bool(figures.bad))


if __name__ == "__main__":
    main()
