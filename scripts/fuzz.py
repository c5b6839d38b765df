"""Give everything that reads others' files and values bad input, on and on, and keep what it should not have ended in.

python scripts/fuzz.py --minutes 10 --seed 1                  # every target in turn, with other cases each round
python scripts/fuzz.py --only header --only rows-csv --minutes 1

A target is a line of tests/fuzzing/table.py. Each round of one runs in a process of its own, so that a crash of a library is a
finding and not the end. A finding is an exception that is no RecipeError, a message that is not one line under 300 characters,
5 s of CPU, more memory than three times the input and 64 MiB, a crash, or what an oracle says. The smallest case of each is kept
in --findings, as Python, with its traceback; the exit code is 1 where there is one.
"""

import argparse
import importlib
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ADDRESSES = 6 << 30  # bytes of addresses beyond those of the start: a case that wants more gets a MemoryError
ROUND = 200  # cases of a target before the next has its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a target's name")
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    targets = importlib.import_module("fuzzing.table").TARGETS
    if unknown := set(given.only) - set(targets):
        parser.error(f"no target {sorted(unknown)[0]}; there are {', '.join(targets)}")
    end = time.monotonic() + 60 * given.minutes
    totals: dict[str, Counter[str]] = {name: Counter() for name in given.only or targets}
    seconds = dict.fromkeys(totals, 0.0)
    round_number = 0
    while time.monotonic() < end:
        for name, counts in totals.items():
            if (left := end - time.monotonic()) > 0:
                began = time.monotonic()
                counts.update(_round(targets[name], f"{given.seed}/{round_number}", left, given.findings))
                seconds[name] += time.monotonic() - began
        round_number += 1
    _tell(totals, seconds, given.findings)
    if any(counts["findings"] for counts in totals.values()):
        sys.exit(1)


def _tell(totals: dict[str, Counter[str]], seconds: dict[str, float], findings: Path) -> None:
    for name, counts in totals.items():
        cases = counts["taken"] + counts["refused"] + counts["findings"]
        rate = cases / seconds[name] if seconds[name] else 0
        told = f"{counts['taken']} taken, {counts['refused']} refused, {counts['findings']} findings"
        print(f"{name:24} {cases:8} cases {rate:6.0f}/s  {told}")
    every = sum(totals.values(), Counter())
    print(
        f"{every['taken'] + every['refused'] + every['findings']} cases, {every['findings']} of them findings ({findings})"
    )


def _round(target: Any, seed: str, left: float, findings: Path) -> Counter[str]:
    """Some cases of a target, in a process of their own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="spunge-fuzz-") as folder:
        child = context.Process(target=_cases, args=(target, seed, left, Path(folder), findings, theirs))
        child.start()
        theirs.close()
        counts: Counter[str] = Counter()
        while True:
            try:
                counts.update(mine.recv())
            except EOFError:
                break
        child.join()
        if child.exitcode:
            how = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
            case = Path(folder, "case.txt")
            _keep(findings, target.name, how, case.read_text(errors="replace") if case.exists() else "", how)
            counts["findings"] += 1
    return counts


def _cases(target: Any, seed: str, left: float, folder: Path, findings: Path, pipe: Connection) -> None:
    trial = importlib.import_module("fuzzing.trial")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, held + ADDRESSES))
    end = time.monotonic() + min(left, 60)
    scratch = folder / "scratch"
    scratch.mkdir()
    counts: Counter[str] = Counter()

    for number in range(ROUND):
        if time.monotonic() > end:
            break
        case = target.make(random.Random(f"{seed} {number}"))
        (folder / "case.txt").write_text(repr(case), errors="backslashreplace")
        try:
            warm = sum(counts.values()) > 20  # what is imported when it is first used is nobody's input
            counts[(trial.tried_in_memory if warm else trial.tried)(target, scratch, case)] += 1
        except (Exception, trial.HangError) as error:
            counts["findings"] += 1
            _keep(findings, target.name, _kind(error), repr(case), traceback.format_exc())

    pipe.send(counts)


def _kind(error: BaseException) -> str:
    """The same for findings of one cause: the error and the last line of the package that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/spunge/" in frame.filename]
    where = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else ""
    what = re.sub(r"[^a-z]+", " ", str(error)[:40].lower()) if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__} {where} {what}".strip()


def _keep(findings: Path, target: str, kind: str, case: str, told: str) -> None:
    """The smallest case of each kind."""
    findings.mkdir(parents=True, exist_ok=True)
    file = findings / f"{target} {re.sub(r'[^A-Za-z0-9_. -]', '', kind)[:80]}.txt"
    if file.exists() and len(file.read_text(encoding="utf-8").partition("\n\n")[0]) <= len(case):
        return
    if not file.exists():
        print(f"finding: {target}: {kind}", flush=True)
    file.write_text(f"{case}\n\n{told}", encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    main()
