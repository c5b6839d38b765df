"""The scores of several runs beside each other, refused where they were not measured with the same instrument."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError, printable, suggestion
from spunge.report.front import Candidate, Front, front, together
from spunge.report.reading import shown
from spunge.report.scores import Metric, Scores, Shift, arranged, interval, way_of
from spunge.report.settings import Setting, differing
from spunge.report.wording import MISSING
from spunge.results import (
    SUBJECTS,
    Difference,
    Evaluation,
    Model,
    Results,
    Row,
    Wanted,
    json_value,
    read_results,
    run_folder,
)


class Finished(NamedTuple):
    """A run that is compared."""

    name: str
    results: Results
    scores: Scores

    def model(self, stage: str) -> Model:
        return next(model for model in self.scores.models if model.stage == stage)

    @property
    def base(self) -> tuple[str, str] | None:
        """What the base is called, and its weights' fingerprint; None where an older file does not tell."""
        known = next((model for model in self.scores.models if model.base_fingerprint), None)
        return None if known is None else (str(known.base), str(known.base_fingerprint))


class Line(NamedTuple):
    """A metric on a subject, which way of it is good (None also where the runs differ in that), the base's score and each run's."""

    metric: Metric
    subject: str
    wanted: Wanted | None
    target: float | None  # what it should be near, where that is what is wanted
    base: Row | None
    rows: tuple[Row | None, ...]

    @property
    def way(self) -> str:
        """As people read it."""
        return (way_of(self.wanted, self.target) if self.wanted == "near" else self.wanted) or MISSING


class Paired(NamedTuple):
    """A run's stage against the first run's, paired by item. run: the run's place."""

    run: int
    difference: Difference


class Comparison(NamedTuple):
    stage: str
    runs: tuple[Finished, ...]
    settings: tuple[Setting, ...] = ()  # of their recipes, that differ
    paired: tuple[Paired, ...] = ()  # none where nobody looked at the items
    remarks: tuple[str, ...] = ()  # such as why items are not paired

    @property
    def headings(self) -> list[str]:
        """How each run's model was made: `npo, ties, scale 0.5`."""
        return [made_by(run.model(self.stage)) for run in self.runs]

    def lines(self) -> Iterator[Line]:
        """A metric, a subject and each run's score of it: all that any run has at the stage."""
        scores = [run.scores for run in self.runs]
        for metric in dict.fromkeys(metric.name for run in self.runs for metric in run.scores.every):
            each = [one.metric(metric) for one in scores]
            known = [one for one in each if one is not None]
            # The same digits for all: those that all runs' numbers together ask for.
            shown = together(scores, metric)
            for subject in dict.fromkeys(subject.name for one in known for subject in one.subjects):
                scored = tuple(one.row(self.stage, subject) if one else None for one in each)
                if any(scored):
                    ways = {(row.wanted, row.target) for row in scored if row is not None}
                    bases = (one.row("base", subject) for one in known)
                    base = next((row for row in bases if row is not None), None)
                    yield Line(shown, subject, *(ways.pop() if len(ways) == 1 else (None, None)), base, scored)

    def front(self) -> Front | None:
        """Of the base, each run's model and its controls."""
        models = (
            [Candidate(0, "base", "base")] if any(model.stage == "base" for model in self.runs[0].scores.models) else []
        )
        for place, run in enumerate(self.runs):
            models.append(Candidate(place, self.stage, run.name))
            controls = [control for control in run.scores.of_kind("control") if control.stage != self.stage]
            models += [Candidate(place, control.stage, f"{run.name}: {control.label}") for control in controls]
        overall = {each.overall for run in self.runs for each in run.results.evaluations if each.overall}
        return front([run.scores for run in self.runs], models, overall)

    def pairs(self) -> Iterator[tuple[Metric, str, tuple[Shift | None, ...]]]:
        """A metric, a subject, and how far each run but the first lies from the first."""
        shifts = {
            (each.run, each.difference.metric, each.difference.subject): shift_of(each.difference)
            for each in self.paired
        }
        for line in self.lines():
            each = tuple(shifts.get((run, line.metric.name, line.subject)) for run in range(1, len(self.runs)))
            if any(shift is not None for shift in each):
                yield line.metric, line.subject, each

    def notes(self) -> list[str]:
        """Where an evaluation was set otherwise in one run than in another; what measured it is the same."""
        notes = [*self.remarks, *_bases_unlike(self.runs)]
        for one, other in combinations(self.runs, 2):
            for mine in one.results.evaluations:
                same = [each for each in other.results.evaluations if each.name == mine.name]
                if same and set(mine.metrics) & set(same[0].metrics) and (told := _set_otherwise(mine, same[0])):
                    runs = f"in {printable(one.name)!r} and in {printable(other.name)!r}"
                    notes.append(f"the evaluation {mine.name!r} is set otherwise {runs}: {told}")
        return notes

    def to_json(self) -> dict[str, Any]:
        content = {
            "stage": self.stage,
            "runs": [run.name for run in self.runs],
            "made_by": self.headings,
            "settings": [setting._asdict() for setting in self.settings],
            "rows": [_line_json(line) for line in self.lines()],
            "differences": [
                {"run": self.runs[run].name, "against": self.runs[0].name, **_difference_json(difference)}
                for run, difference in self.paired
            ],
            "front": _front_json(self.front(), self.runs),
            "notes": self.notes(),
        }
        return {key: json_value(value) for key, value in content.items()}


def compare(folders: Sequence[Path], stage: str = "merged") -> Comparison:
    """Read several runs and set one stage's scores beside each other.

    Raises RecipeError where a folder holds no results or no scores, where a run has no such stage, where two runs start from other
    bases, and where they measured a metric with other instruments (another scorer, revision or threshold) or on other items.
    """
    if len(folders) < 2:
        raise RecipeError("compare: one run alone; give two or more run folders")
    folders = [run_folder(folder) for folder in folders]
    runs = [_finished(folder, shown) for folder, shown in zip(folders, _names(folders), strict=True)]
    for run in runs:
        if not run.results.rows:
            raise RecipeError(
                f"compare: {run.name!r} has no scores, for its recipe judges nothing (evaluate); leave it out"
            )
        stages = [model.stage for model in run.scores.models]
        if stage not in stages:
            raise RecipeError(
                f"--stage: {run.name!r} has no stage {stage!r}{suggestion(stage, stages)}; it has {', '.join(stages)}"
            )
    for one, other in combinations(runs, 2):
        _refuse_base(one, other)
        _refuse_others(one, other)
        _refuse_subjects(one, other)
    return Comparison(stage, tuple(runs), tuple(differing(folders)))


def _finished(folder: Path, shown: str) -> Finished:
    # Beneath a file that is no run's lies nothing, and what lies beside it is not its own.
    results = replace(read_results(folder), folder=folder)
    return Finished(shown, results, arranged(results))


def _names(folders: Sequence[Path]) -> list[str]:
    """Folders' own names where these tell them apart; else their paths."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _refuse_base(one: Finished, other: Finished) -> None:
    """Raise RecipeError where two runs start from models whose weights differ."""
    if one.base is None or other.base is None or one.base[1] == other.base[1]:
        return
    told = " and ".join(f"{run.name!r} from {base[0]!r} ({base[1][:12]})" for run in (one, other) if (base := run.base))
    raise RecipeError(
        f"compare: the runs start from other bases, {told}: what was unlearned cannot be told from what the bases are; "
        "give runs of one base"
    )


def _bases_unlike(runs: Sequence[Finished]) -> Iterator[str]:
    """Where the base's own scores differ between runs, though it is the same base on the same items."""
    if silent := [repr(run.name) for run in runs if run.base is None]:
        yield printable(f"which base they started from is not told, being of an older version, by: {', '.join(silent)}")
    for one, other in combinations(runs, 2):
        unlike = [
            f"{metric.name} on {row.subject}"
            for metric in one.scores.every
            for (stage, subject), row in metric.rows.items()
            if stage == "base"
            and (there := other.scores.metric(metric.name)) is not None
            and (theirs := there.row("base", subject)) is not None
            and not math.isclose(row.value, theirs.value, rel_tol=1e-6)
        ]
        if unlike:
            where = f"{len(unlike)} scores of the base differ between {one.name!r} and {other.name!r} (the first: {unlike[0]})"
            yield printable(f"{where}; a device or dtype may: the column is the first run's")


def made_by(model: Model) -> str:
    """`npo, ties, density 0.2, scale 0.5`: of what it was told."""
    numbers = [
        f"{label} {value:g}"
        for label, value in (("density", model.density), ("scale", model.scale))
        if value is not None
    ]
    return ", ".join(filter(None, [model.method, model.rule, *numbers])) or model.label


def shift_of(row: Difference) -> Shift:
    return Shift(row.value, interval(row), row.kind == "ratio", row.n, row.changed)


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


def _refuse_subjects(one: Finished, other: Finished) -> None:
    """Raise RecipeError where a subject of one measurement has other items in one run than in the other, as far as they say."""
    mine, theirs = (_members(run) for run in (one, other))
    for entry in one.results.evaluations:
        for same in other.results.evaluations:
            if not set(entry.metrics) & set(same.metrics) or entry.rows != same.rows:
                continue
            if entry.name != same.name and {entry.name, same.name} & mine.keys() & theirs.keys():
                continue  # another one has that name in both
            own, others = mine.get(entry.name, {}), theirs.get(same.name, {})
            for subject in own.keys() & others.keys():
                if own[subject] != others[subject]:
                    raise RecipeError(
                        f"compare: {subject!r} of the evaluation {entry.name!r} holds other items in {one.name!r} "
                        f"({len(own[subject])}) than in {other.name!r} ({len(others[subject])}); split both by one attribute"
                    )


def _members(run: Finished) -> dict[str, dict[str, frozenset[int]]]:
    """Evaluation -> subject -> its items; empty for a run of an older version, which does not say."""

    def read(content: Mapping[str, Any]) -> dict[str, dict[str, frozenset[int]]]:
        return {
            name: {subject: frozenset(items) for subject, items in subjects.items()}
            for name, subjects in content.items()
        }

    none: dict[str, dict[str, frozenset[int]]] = {}
    return shown(run.results.folder / SUBJECTS, read, none)


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
            f"{head} was measured with different instruments: {_told(mine, theirs)} in {one.name!r}, {_told(theirs, mine)} in "
            f"{other.name!r}; judge both with one"
        )
    if problem == "items":
        raise RecipeError(
            f"{head} was measured on items that differ between {one.name!r} and {other.name!r}; give both the same "
            "source, where, limit and columns"
        )


def _told(evaluation: Evaluation, other: Evaluation) -> str:
    """Of an evaluation's instrument, what is not the same in the other's."""
    mine, theirs = (dict(_flat(each.instrument or {})) for each in (evaluation, other))
    differing = [f"{key}: {value}" for key, value in mine.items() if theirs.get(key, MISSING) != value]
    return f"({', '.join(differing)})" if differing else "none"


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


def _line_json(line: Line) -> dict[str, Any]:
    aim = {} if line.target is None else {"target": line.target}
    base = {} if line.base is None else {"base": _score_json(line.base)}
    scores = [None if row is None else _score_json(row) for row in line.rows]
    return {"metric": line.metric.name, "subject": line.subject, "wanted": line.wanted, **aim, **base, "scores": scores}


def _score_json(row: Row | Difference) -> dict[str, Any]:
    ends = interval(row)
    return {"value": row.value, "low": ends and ends.low, "high": ends and ends.high, "n": row.n}


def _difference_json(row: Difference) -> dict[str, Any]:
    return {"metric": row.metric, "subject": row.subject, "kind": row.kind, **_score_json(row), "changed": row.changed}


def _front_json(drawn: Front | None, runs: Sequence[Finished]) -> dict[str, Any] | None:
    if drawn is None:
        return None
    points = [
        {
            "run": None if point.model.stage == "base" else runs[point.model.run].name,
            "stage": point.model.stage,
            "forget": point.forgotten,
            "keep": point.kept,
            "front": point.front,
        }
        for point in drawn.points
    ]
    return {"forget": drawn.forget._asdict(), "keep": drawn.keep._asdict(), "points": points}
