"""The scores of several runs beside each other, refused where they were not measured with the same instrument."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError, printable, suggestion
from spunge.report.scores import Metric, Scores, arranged, interval, way_of
from spunge.report.wording import MISSING, aligned, name, shortened
from spunge.results import Evaluation, Results, Row, Wanted, json_value, read_results

NAME = 40  # columns that a metric's or subject's name may take


class Finished(NamedTuple):
    """A run that is compared."""

    name: str
    results: Results
    scores: Scores


class Line(NamedTuple):
    """A metric on a subject, which way of it is good (None also where the runs differ in that), and each run's score."""

    metric: Metric
    subject: str
    wanted: Wanted | None
    target: float | None  # what it should be near, where that is what is wanted
    rows: tuple[Row | None, ...]


class Comparison(NamedTuple):
    stage: str
    runs: tuple[Finished, ...]

    def lines(self) -> Iterator[Line]:
        """A metric, a subject and each run's score of it: all that any run has at the stage."""
        for metric in dict.fromkeys(metric.name for run in self.runs for metric in run.scores.every):
            each = [run.scores.metric(metric) for run in self.runs]
            known = [one for one in each if one is not None]
            # The same digits for all: those that all runs' numbers together ask for.
            rows = {
                (f"{run} {stage}", of): row for run, one in enumerate(known) for (stage, of), row in one.rows.items()
            }
            together = Metric(metric, (), rows)
            for subject in dict.fromkeys(subject.name for one in known for subject in one.subjects):
                scored = tuple(one.row(self.stage, subject) if one else None for one in each)
                if any(scored):
                    ways = {(row.wanted, row.target) for row in scored if row is not None}
                    yield Line(together, subject, *(ways.pop() if len(ways) == 1 else (None, None)), scored)

    def text(self) -> str:
        """A line per metric and subject, a column per run."""
        lines = [["metric", "subject", "wanted", *(printable(run.name) for run in self.runs)]]
        for metric, subject, wanted, target, rows in self.lines():
            shown = (MISSING if row is None else metric.with_interval(row) for row in rows)
            named = (shortened(printable(metric.name), NAME), shortened(name(subject), NAME))
            lines.append([*named, (way_of(wanted, target) if wanted == "near" else wanted) or MISSING, *shown])
        notes = "".join(f"note: {note}\n" for note in self.notes())
        return aligned(lines) + (f"\n{notes}" if notes else "")

    def notes(self) -> list[str]:
        """Where an evaluation was set otherwise in one run than in another; what measured it is the same."""
        notes = []
        for one, other in combinations(self.runs, 2):
            for mine in one.results.evaluations:
                same = [each for each in other.results.evaluations if each.name == mine.name]
                if same and set(mine.metrics) & set(same[0].metrics) and (told := _set_otherwise(mine, same[0])):
                    runs = f"in {printable(one.name)!r} and in {printable(other.name)!r}"
                    notes.append(f"the evaluation {mine.name!r} is set otherwise {runs}: {told}")
        return notes

    def to_json(self) -> dict[str, Any]:
        lines = []
        for metric, subject, wanted, target, rows in self.lines():
            scores = [None if row is None else _score_json(row) for row in rows]
            aim = {} if target is None else {"target": target}
            lines.append({"metric": metric.name, "subject": subject, "wanted": wanted, **aim, "scores": scores})
        content = {"stage": self.stage, "runs": [run.name for run in self.runs], "rows": lines, "notes": self.notes()}
        return {key: json_value(value) for key, value in content.items()}


def compare(folders: Sequence[Path], stage: str = "merged") -> Comparison:
    """Read several runs and set one stage's scores beside each other.

    Raises RecipeError where a folder holds no results, where a run has no such stage, and where two runs measured a
    metric with other instruments (such as another scorer, revision or threshold) or on other items.
    """
    if len(folders) < 2:
        raise RecipeError("compare: one run alone; give two or more run folders")
    runs = [_finished(folder, shown) for folder, shown in zip(folders, _names(folders), strict=True)]
    for run in runs:
        stages = [model.stage for model in run.scores.models]
        if stage not in stages:
            raise RecipeError(
                f"--stage: {run.name!r} has no stage {stage!r}{suggestion(stage, stages)}; it has {', '.join(stages)}"
            )
    for one, other in combinations(runs, 2):
        _refuse_others(one, other)
    return Comparison(stage, tuple(runs))


def _finished(folder: Path, shown: str) -> Finished:
    results = read_results(folder)
    return Finished(shown, results, arranged(results))


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


def _evaluations(run: Finished, metric: str) -> dict[str, Evaluation]:
    """Name -> evaluation, of those that report a metric."""
    reporting = {each.name: each for each in run.results.evaluations if metric in each.metrics}
    if not reporting:
        raise RecipeError(
            f"compare: {run.name!r} does not say what {metric!r} was measured with, being of an older version; "
            "`spunge run` on it again writes that down"
        )
    return reporting


def _problem(mine: Evaluation, theirs: Evaluation) -> str | None:
    if mine.instrument != theirs.instrument:
        return "instrument"
    return "items" if mine.rows != theirs.rows else None


def _refuse(metric: str, one: Finished, mine: Evaluation, other: Finished, theirs: Evaluation) -> None:
    problem = _problem(mine, theirs)
    called = dict.fromkeys([mine.name, theirs.name])
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


def _told(evaluation: Evaluation) -> str:
    instrument = evaluation.instrument or {}
    return f"({', '.join(f'{key}: {value}' for key, value in instrument.items())})" if instrument else "none"


def _set_otherwise(mine: Evaluation, theirs: Evaluation) -> str:
    """`normalize 'tokens' and 'characters'`; nothing where all is the same, or an older file does not say."""
    if mine.settings is None or theirs.settings is None:
        return ""
    one, other = dict(_flat(mine.settings)), dict(_flat(theirs.settings))
    return "; ".join(
        f"{setting} {one.get(setting)!r} and {other.get(setting)!r}"
        for setting in dict.fromkeys([*one, *other])
        if one.get(setting) != other.get(setting)
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for setting, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{setting}.")
        else:
            yield f"{prefix}{setting}", value


def _score_json(row: Row) -> dict[str, Any]:
    ends = interval(row)
    return {"value": row.value, "low": ends and ends.low, "high": ends and ends.high, "n": row.n}
