"""The runs of a folder, read and never changed; nothing that a recipe names is loaded."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spunge.errors import RecipeError
from spunge.report.comparison import made_by
from spunge.report.headline import headline
from spunge.report.scores import arranged
from spunge.report.settings import RECIPE, recipe_of
from spunge.report.wording import unisolated
from spunge.results import FILE, Results, read_results
from spunge.run.live import FILE as PROGRESS

State = Literal["running", "stopped", "finished", "begun"]
DEEP = 3  # levels of folders that are looked through
MOST = 5000  # folders
MARKS = ("stamps", RECIPE, FILE)  # one of these makes a folder a run's
LIMIT = 1 << 20  # bytes of a file that tells how far a run is


@dataclass(frozen=True)
class Listed:
    """A run of the folder. name: its path from there."""

    name: str
    folder: Path
    state: State
    changed: float  # seconds since 1970
    model: str
    made_by: str
    said: str  # the first of what its numbers say
    wrong: str = ""  # why its results cannot be read


class About(NamedTuple):
    """The base, how the model was made, and the first thing that its numbers say."""

    model: str
    made_by: str
    said: str


class Progress(NamedTuple):
    """How far a run is, as the command that is at work there last wrote."""

    stages: list[dict[str, Any]]
    waiting: list[str]
    finished: int
    expected: int  # stages
    left: float | None  # seconds
    begun: float  # seconds since 1970
    written: float


def listed(root: Path) -> dict[str, Path]:
    """The runs below a folder, by their path from there. No link is followed."""
    runs: dict[str, Path] = {}
    for seen, (where, folders, files) in enumerate(os.walk(root)):
        here = Path(where)
        depth = len(here.relative_to(root).parts)
        folders[:] = sorted(each for each in folders if not each.startswith(".") and not (here / each).is_symlink())
        if any(mark in files or (mark in folders) for mark in MARKS):
            runs[here.relative_to(root).as_posix()] = here
            folders[:] = []
        if depth >= DEEP or seen > MOST:
            folders[:] = []
    return runs


class Reader:
    """Reads results, and keeps what it read until the file changes."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[tuple[int, int], Results | RecipeError, About]] = {}

    def results(self, folder: Path) -> Results:
        """Raises RecipeError where there are none that can be read."""
        results, _ = self._kept(folder)
        if isinstance(results, RecipeError):
            raise results
        return results

    def _kept(self, folder: Path) -> tuple[Results | RecipeError, About]:
        file = folder / FILE
        try:
            stat = file.lstat()
        except OSError:
            return RecipeError(f"{str(folder)!r} holds no {FILE}"), _about(folder, None)
        if file.is_symlink():
            return RecipeError(f"{str(file)!r} is a link, which is not followed"), _about(folder, None)
        mark = (stat.st_mtime_ns, stat.st_size)
        if folder not in self._read or self._read[folder][0] != mark:
            try:
                results = read_results(folder)
                self._read[folder] = mark, results, _about(folder, results)
            except RecipeError as error:
                self._read[folder] = mark, error, _about(folder, None)
        return self._read[folder][1:]

    def every(self, root: Path) -> Iterator[Listed]:
        """The runs of a folder, the one that changed last first."""
        runs = [self.run(name, folder) for name, folder in listed(root).items()]
        yield from sorted(runs, key=lambda run: (run.state != "running", -run.changed))

    def run(self, name: str, folder: Path) -> Listed:
        results, about = self._kept(folder)
        there = (folder / FILE).exists()
        wrong = str(results) if there and isinstance(results, RecipeError) else ""
        return Listed(name, folder, _state(folder, progress_of(folder)), _changed(folder), *about, wrong)


def _about(folder: Path, results: Results | None) -> About:
    if results is not None:
        scores = arranged(results)
        merged = next(iter(scores.of_kind("merged")), None)
        base = next((model.base for model in results.models if model.base), "")
        return About(base or "", made_by(merged) if merged else "", unisolated(headline(scores)))
    try:
        recipe = recipe_of(folder) if not (folder / RECIPE).is_symlink() else {}
    except RecipeError:
        return About("", "", "")
    model, unlearn = recipe.get("model"), recipe.get("unlearn")
    path = model.get("path") if isinstance(model, Mapping) else ""
    method = unlearn.get("method") if isinstance(unlearn, Mapping) else ""
    return About(str(path or ""), str(method or ""), "")


def _state(folder: Path, progress: Progress | None) -> State:
    if progress is not None:
        return "running"
    if (folder / PROGRESS).exists():
        return "stopped"  # whoever wrote it is gone without a word
    return "finished" if (folder / FILE).exists() else "begun"


def _changed(folder: Path) -> float:
    """When the run last got a file, as far as its own tell."""
    times = []
    for file in (PROGRESS, FILE, RECIPE, "stamps"):
        try:
            times.append((folder / file).lstat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def progress_of(folder: Path) -> Progress | None:
    """How far a command is that is at work in the folder; None where none is, or where it left without a word."""
    file = folder / PROGRESS
    try:
        if file.is_symlink() or file.stat().st_size > LIMIT:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != 1 or (content["host"] == socket.gethostname() and not _alive(int(content["pid"]))):
            return None
        left = content["left"]
        return Progress(
            [_under_way(each) for each in content["stages"]],
            [str(title) for title in content["waiting"]],
            int(content["finished"]),
            int(content["count"]),
            None if left is None else _finite(left),
            _finite(content["begun"]),
            min(_finite(content["written"]), time.time()),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _under_way(told: Mapping[str, Any]) -> dict[str, Any]:
    """A stage, with the share of it that is done. Raises what `progress_of` takes for no progress."""
    done, total = int(told["done"]), int(told["total"])
    left = None if told["left"] is None else _finite(told["left"])
    share = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
    about = {"title": str(told["title"]), "note": str(told["note"]), "seconds": _finite(told["seconds"])}
    return {**about, "done": done, "total": total, "left": left, "share": share}


def _finite(told: Any) -> float:
    """A number of the file. Raises ValueError where it is none."""
    if math.isfinite(number := float(told)):
        return number
    raise ValueError(f"{number} is no number of seconds")


def _alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
