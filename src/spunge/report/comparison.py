"""The scores of several runs beside each other, refused where they were not measured with the same instrument."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError, suggestion
from spunge.files import read_json
from spunge.report.reading import read_scores
from spunge.report.scores import Cell, Metric, Scores
from spunge.report.wording import MISSING, aligned, clean, name, shortened

NAME = 40  # columns that a metric's or subject's name may take


class Finished(NamedTuple):
    """A run that is compared."""

    name: str
    content: Mapping[str, Any]
    scores: Scores


class Comparison(NamedTuple):
    stage: str
    runs: tuple[Finished, ...]

    def lines(self) -> Iterator[tuple[Metric, str, tuple[Cell | None, ...]]]:
        """A metric, a subject and each run's score of it: all that any run has at the stage."""
        for metric in dict.fromkeys(metric.name for run in self.runs for metric in run.scores.every):
            mine = [run.scores.metric(metric) for run in self.runs]
            known = [found for found in mine if found is not None]
            # The same digits for all: those that all runs' numbers together ask for.
            cells = {(f"{at} {stage}", of): c for at, m in enumerate(known) for (stage, of), c in m.cells.items()}
            together = Metric(metric, known[0].higher_is_better, (), cells)
            for subject in dict.fromkeys(subject.name for found in known for subject in found.subjects):
                scored = tuple(found.cell(self.stage, subject) if found else None for found in mine)
                if any(scored):
                    yield together, subject, scored

    def text(self) -> str:
        """A line per metric and subject, a column per run."""
        lines = [["metric", "subject", *(clean(run.name) for run in self.runs)]]
        for metric, subject, cells in self.lines():
            shown = (MISSING if cell is None else metric.with_interval(cell) for cell in cells)
            lines.append([shortened(clean(metric.name), NAME), shortened(name(subject), NAME), *shown])
        return aligned(lines)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for metric, subject, cells in self.lines():
            found = [None if cell is None else _cell_json(cell) for cell in cells]
            rows.append({"metric": metric.name, "subject": subject, "scores": found})
        return {"stage": self.stage, "runs": [run.name for run in self.runs], "rows": rows}


def compare(folders: Sequence[Path], stage: str = "merged") -> Comparison:
    """Read several runs and set one stage's scores beside each other.

    Raises RecipeError where a folder holds no results, where a run has no such stage, and where two runs measured a
    metric with other instruments (such as another scorer, revision or threshold) or on other items.
    """
    if len(folders) < 2:
        raise RecipeError("compare: one run alone; give two or more run folders")
    runs = [_finished(folder, shown) for folder, shown in zip(folders, _names(folders), strict=True)]
    for run in runs:
        stages = [found.key for found in run.scores.stages]
        if stage not in stages:
            raise RecipeError(
                f"--stage: {run.name!r} has no stage {stage!r}{suggestion(stage, stages)}; it has {', '.join(stages)}"
            )
    for one, other in combinations(runs, 2):
        _refuse_others(one, other)
    return Comparison(stage, tuple(runs))


def results_of(folder: Path) -> Mapping[str, Any]:
    """The content of RUN/results.json. Raises RecipeError where there is none."""
    content = read_json(folder / "results.json")
    if not isinstance(content, Mapping):
        raise RecipeError(f"{str(folder)!r} holds no results.json; give the folder of a finished run (spunge run)")
    return content


def _finished(folder: Path, shown: str) -> Finished:
    content = results_of(folder)
    return Finished(shown, content, read_scores(content))


def _names(folders: Sequence[Path]) -> list[str]:
    """Folders' own names where these tell them apart; else their paths."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _refuse_others(one: Finished, other: Finished) -> None:
    """Raise RecipeError where two runs' evaluations of one metric are not the same measurement."""
    shared = {metric.name for metric in one.scores.every} & {metric.name for metric in other.scores.every}
    for metric in sorted(shared):
        mine, theirs = (_evaluations(run, metric) for run in (one, other))
        for key in sorted(mine.keys() & theirs.keys()):
            _refuse(metric, one, mine.pop(key), other, theirs.pop(key))
        # Those of other names may be the same evaluation renamed; where nothing says so, they are not comparable.
        for entry in mine.values():
            if theirs and not any(_problem(entry, candidate) is None for candidate in theirs.values()):
                _refuse(metric, one, entry, other, next(iter(theirs.values())))


def _evaluations(run: Finished, metric: str) -> dict[str, Mapping[str, Any]]:
    """Name -> entry, of those that report a metric."""
    entries = run.content.get("evaluations") or []
    found = {str(entry["name"]): entry for entry in entries if metric in entry["metrics"]}
    if not found:
        raise RecipeError(
            f"compare: {run.name!r} does not say what {metric!r} was measured with, being of an older version; "
            "`spunge run` on it again writes that down"
        )
    return found


def _problem(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    if mine.get("instrument") != theirs.get("instrument"):
        return "instrument"
    return "items" if mine.get("rows") != theirs.get("rows") else None


def _refuse(metric: str, one: Finished, mine: Mapping[str, Any], other: Finished, theirs: Mapping[str, Any]) -> None:
    problem = _problem(mine, theirs)
    called = {str(entry["name"]): None for entry in (mine, theirs)}
    head = f"compare: {metric!r} of the evaluation {' and '.join(map(repr, called))}"
    if problem == "instrument":
        raise RecipeError(
            f"{head} was measured with different instruments: {_told(mine)} in {one.name!r}, {_told(theirs)} in "
            f"{other.name!r}; judge both with one"
        )
    if problem == "items":
        raise RecipeError(
            f"{head} was measured on items that differ between {one.name!r} and {other.name!r}; give both the same "
            "source, where, limit and columns"
        )


def _told(entry: Mapping[str, Any]) -> str:
    instrument = entry.get("instrument") or {}
    return f"({', '.join(f'{key}: {value}' for key, value in instrument.items())})" if instrument else "none"


def _cell_json(cell: Cell) -> dict[str, Any]:
    interval = cell.interval._asdict() if cell.interval else {"low": None, "high": None}
    return {"value": cell.value, **interval, "n": cell.n}
