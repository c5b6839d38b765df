"""Runs in processes of their own, which tests kill and start again, and what is the same of two runs."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What two undisturbed runs differ in: what they took.
TOOK = re.compile(
    r'"(seconds|peak_memory)": [0-9.e-]+,?|"(xxh3|check|key)": "[0-9a-f]+"|"size": \d+|([0-9.]+ (h|min|s|GiB|MiB)\b ?)+'
    # In the page: when, and the stages by what they took.
    r"|<time>[^<]*</time>|(?s:<details><summary>Time of each stage</summary>.*?</details>\s*)"
)


def content(run: Path) -> dict[str, bytes | str]:
    """Every file of a run, without what it took. A key of a merge has the times of the deltas' files in it."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    timed = {".json", ".jsonl", ".html"}
    return {
        str(path.relative_to(run)): TOOK.sub("", path.read_text()) if path.suffix in timed else path.read_bytes()
        for path in files
    }


class Command:
    """`spunge run` in a process of its own."""

    def __init__(self, recipe: Path, out: Path, *overrides: str) -> None:
        settings = [part for override in overrides for part in ("--set", override)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spunge", "run", str(recipe), "--out", str(out), *settings],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def children(self) -> list[int]:
        """The processes that it started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == self.process.pid and fields[0] != "Z":
                found.append(int(entry.parent.name))
        return found

    def ended(self, within: float = 300.0) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=within)
        return self.process.returncode, errors


def until(holds: Callable[[], Any], seconds: float = 200.0) -> Any:
    """What it gives, once that is true."""
    stop = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < stop, "it never came to that"
        time.sleep(0.02)
    return value


def steps(run: Path, branch: str) -> int:
    """How many steps a branch's log has."""
    log = run / "branches" / branch / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def at_work(run: Path) -> bool:
    return steps(run, "asia") > 3 and steps(run, "europe") > 3


def under_way(recipe: Path, run: Path, *overrides: str, within: float = 200.0) -> Command:
    """A command both of whose branches are in training."""
    command = Command(recipe, run, *overrides)
    until(lambda: at_work(run), within)
    return command
