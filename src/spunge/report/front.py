"""What is forgotten against what is kept: the models of several runs by two means, and those that no other one beats."""

from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import Metric, Scores, way_of
from spunge.results import Group, Wanted, merit


class Goal(NamedTuple):
    """A metric as a mean over subjects that all of the models were measured on."""

    metric: str
    group: Group
    subjects: tuple[str, ...]
    wanted: Wanted
    target: float | None

    @property
    def way(self) -> str:
        return way_of(self.wanted, self.target)


class Candidate(NamedTuple):
    """A model of a run. run: the run's place."""

    run: int
    stage: str
    label: str


class Point(NamedTuple):
    """A model's two means. front: no other model is as good by both and better by one."""

    model: Candidate
    forgotten: float
    kept: float
    front: bool


class Front(NamedTuple):
    forget: Goal
    keep: Goal
    points: tuple[Point, ...]


def front(scores: Sequence[Scores], models: Sequence[Candidate], overall: Collection[str] = ()) -> Front | None:
    """By the first metric that all models have on what is to be forgotten, and the first on what is to be kept; None without these.
    A metric that is 0 for all of them comes last.

    overall: subjects that hold the items of the others, which count once.
    """
    forget, keep = (_goal(scores, models, group, overall) for group in ("forget", "keep"))
    if forget is None or keep is None:
        return None
    values = [(_mean(scores, model, forget), _mean(scores, model, keep)) for model in models]
    good = [(merit(one, forget.wanted, forget.target), merit(other, keep.wanted, keep.target)) for one, other in values]
    points = (
        Point(model, *value, front=not any(_beats(other, own) for other in good))
        for model, value, own in zip(models, values, good, strict=True)
    )
    return Front(forget, keep, tuple(points))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def _goal(scores: Sequence[Scores], models: Sequence[Candidate], group: Group, overall: Collection[str]) -> Goal | None:
    goals = list(_goals(scores, models, group, overall))
    telling = (goal for goal in goals if any(_mean(scores, model, goal) for model in models))
    return next(telling, goals[0] if goals else None)


def _goals(
    scores: Sequence[Scores], models: Sequence[Candidate], group: Group, overall: Collection[str]
) -> Iterator[Goal]:
    """Metrics of a group that say which way is good, on the subjects that every model has."""
    for metric in scores[0].metrics:
        found = [other.metric(metric.name) for other in scores]
        each = [one for one in found if one is not None]
        subjects = [
            subject
            for subject in metric.subjects
            if subject.group == group
            and subject.name not in overall
            and len(each) == len(scores)
            and all(each[model.run].row(model.stage, subject.name) for model in models)
        ]
        ways = {(subject.wanted, subject.target) for subject in subjects}
        if metric.side or len(ways) != 1:
            continue
        wanted, target = ways.pop()
        if wanted is not None:
            yield Goal(metric.name, group, tuple(subject.name for subject in subjects), wanted, target)


def _mean(scores: Sequence[Scores], model: Candidate, goal: Goal) -> float:
    metric = scores[model.run].metric(goal.metric)
    assert metric is not None
    rows = (metric.row(model.stage, subject) for subject in goal.subjects)
    return fmean(row.value for row in rows if row is not None)


def together(scores: Sequence[Scores], name: str) -> Metric:
    """One metric of all runs, for the digits that their numbers together ask for."""
    known = [metric for metric in (each.metric(name) for each in scores) if metric is not None]
    rows = {(f"{run} {stage}", of): row for run, one in enumerate(known) for (stage, of), row in one.rows.items()}
    return Metric(name, (), rows)
