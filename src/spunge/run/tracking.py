"""A run's losses and scores, told to a tracker: read off the logs that trainings write, whichever process writes them.

Where telling fails, such as by a network that is gone, the run goes on without.
"""

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError, first_line, one_line, redacted
from spunge.progress import Expected, Watcher
from spunge.recipe.schema import Recipe
from spunge.registry import TRACKERS
from spunge.results import Results
from spunge.run.trackers.tracker import Log, Tracked

LOG = "log.jsonl"
ROOMS = ("branches", "controls", "teaching")  # folders with trainings, of RUN and of its further seeds
EVERY = 2.0  # seconds between two looks into the logs


def refuse_tracker(recipe: Recipe) -> None:
    """Raises RecipeError where the package of a recipe's tracker is not installed."""
    if recipe.track is None:
        return
    tracker = TRACKERS.get(recipe.track.kind)
    if importlib.util.find_spec(tracker.package) is None:
        raise RecipeError(
            f"track: {recipe.track.kind}: {tracker.package} is not installed; pip install 'spunge[{tracker.extra}]', or leave "
            "track out"
        )


@dataclass
class _Read:
    """How far a log was read."""

    number: int = 0  # the file's, by which one that was begun anew is known
    offset: int = 0  # bytes
    step: int = 0  # the last one that was told


@dataclass
class Following:
    """A watcher that hands on what it hears, and meanwhile tells what the trainings' logs hold that is new."""

    watcher: Watcher
    folder: Path
    log: Log | None = None
    _read: dict[Path, _Read] = field(default_factory=dict)
    _looked: float = float("-inf")

    def expect(self, stages: Sequence[Expected], /) -> None:
        self.watcher.expect(stages)

    def begin(self, title: str) -> None:
        self.watcher.begin(title)

    def step(self, done: int, total: int, note: str = "", /) -> None:
        self.watcher.step(done, total, note)
        if time.monotonic() - self._looked >= EVERY:
            self.look()

    def end(self, outcome: str) -> None:
        self.watcher.end(outcome)
        self.look()

    def look(self, told: bool = True) -> None:
        """Tell the lines that are new since the last time; with told False pass over them."""
        self._looked = time.monotonic()
        if self.log is None:
            return
        for file in _logs(self.folder):
            read = self._read.setdefault(file, _Read())
            for line in _new_lines(file, read):
                step = line.get("step")
                if isinstance(step, int) and step > read.step:
                    read.step = step
                    if told:
                        self._tell(file.parent.relative_to(self.folder).as_posix(), line, step)

    def results(self, results: Results) -> None:
        """Tell the scores."""
        by_stage: dict[str, dict[str, float]] = {}
        for row in results.rows:
            by_stage.setdefault(row.stage, {})[f"{row.metric}/{row.subject}"] = row.value
        for stage, values in by_stage.items():
            self._tell(f"scores/{stage}", values, 0)

    def _tell(self, group: str, values: Mapping[str, Any], step: int) -> None:
        known = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        if self.log is None or not known:
            return
        try:
            self.log.scalars(group, known, step)
        except Exception as error:  # whatever a package, a disk or a network says
            self.log = None
            _warn(error)


def _logs(folder: Path) -> Iterator[Path]:
    for root in (folder, *sorted(folder.glob("seeds/*"))):
        for room in ROOMS:
            yield from sorted((root / room).rglob(LOG))


def _new_lines(file: Path, read: _Read) -> Iterator[Mapping[str, Any]]:
    """Whole lines that were added; all of a log that was begun anew, as it is where a training begins or is taken up again."""
    try:
        with file.open("rb") as opened:
            number = os.fstat(opened.fileno()).st_ino
            if number != read.number:
                read.number, read.offset, read.step = number, 0, 0
            opened.seek(read.offset)
            content = opened.read()
    except OSError:
        return
    whole = content[: content.rfind(b"\n") + 1]
    read.offset += len(whole)
    for line in whole.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, Mapping):
            yield told


@contextmanager
def tracked(recipe: Recipe, folder: Path, watcher: Watcher) -> Iterator[Following]:
    """Inside the block, a watcher that tells the recipe's tracker too. Raises RecipeError where that cannot begin."""
    if recipe.track is None:
        yield Following(watcher, folder)
        return
    tracker = TRACKERS.get(recipe.track.kind)
    content = json.loads(redacted(json.dumps(recipe.model_dump(mode="json", exclude={"execution", "track"}))))
    begun = ExitStack()
    try:
        log = begun.enter_context(tracker.log(recipe.track, Tracked(folder.name, folder, content)))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"track: {recipe.track.kind}: it cannot begin ({type(error).__name__}: {first_line(error)}); leave track out, or mend "
            "that"
        ) from error
    following = Following(watcher, folder, log)
    following.look(told=False)
    try:
        yield following
    except BaseException as error:
        _end(begun, error)
        raise
    _end(begun, None)


def _end(begun: ExitStack, failed: BaseException | None) -> None:
    """Close the tracker; what goes wrong there hides nothing of the run."""
    try:
        begun.__exit__(type(failed) if failed else None, failed, failed.__traceback__ if failed else None)
    except Exception as error:
        if error is not failed:
            _warn(error)


def _warn(error: Exception) -> None:
    said = f"track: {type(error).__name__}: {first_line(error)}; the run goes on without it"
    logging.getLogger("spunge").warning(one_line(said))
