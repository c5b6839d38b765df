"""A search at work: its folders, its settings, and the scores of its runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spunge.progress import Watcher
from spunge.recipe.ranges import Among, Searched
from spunge.report.search import Score, Trial
from spunge.results import Row, read_results
from spunge.run.folder import TRIALS
from spunge.run.objectives import Objective, Way
from spunge.run.trials import Space

POINTS = "points"


@dataclass
class Tuning:
    """A search at work. `good`: of each objective, the way that is."""

    folder: Path
    space: Space
    objectives: tuple[Objective, ...]
    seed: int
    watcher: Watcher
    good: tuple[Way, ...] = ()
    base: tuple[Score, ...] = ()
    told: dict[int, Trial] = field(default_factory=dict)  # number -> a trial that is over

    @property
    def runs(self) -> list[Path]:
        """The folders of runs that stages are taken from, the latest first."""
        trials = sorted((each for each in self.folder.glob(f"{TRIALS}/*") if each.name.isdigit()), key=_number)
        points = sorted((each for each in self.folder.glob(f"{POINTS}/*") if each.name.isdigit()), key=_number)
        return [*reversed(trials), *reversed(points), self.folder / "base"]

    def trial(self, number: int) -> Path:
        return self.folder / TRIALS / str(number)

    def point(self, number: int) -> Path:
        return self.folder / POINTS / str(number)

    def others(self, folder: Path) -> list[Path]:
        """The folders of runs that the run of `folder` takes stages from."""
        return [other for other in self.runs if other != folder]

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Setting -> value, of what Optuna drew."""
        return {setting.name: _value(setting, drawn[setting.name]) for setting in self.space.searched}


def _value(setting: Searched, drawn: Any) -> Any:
    return setting.range.choices[drawn] if isinstance(setting.range, Among) else drawn


def _number(folder: Path) -> int:
    return int(folder.name)


def score(row: Row | None) -> Score:
    return Score(value=math.nan) if row is None else Score(value=row.value, low=row.low, high=row.high, n=row.n)


def scores_of(tuning: Tuning, run: Path, stage: str = "merged") -> tuple[Score, ...]:
    results = read_results(run)
    return tuple(score(objective.row(results, stage)) for objective in tuning.objectives)
