"""What each branch changes besides its own part: the matrix of parts and stages, and a line for each branch."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import Change, Kind, Metric, Scores, Stage
from spunge.report.wording import MISSING


class Spill(NamedTuple):
    """A cell: what a stage changed on a part, against the base."""

    value: str
    interval: str
    kind: str  # own, spill (a branch's on another part), control, merged or stage
    certain: bool
    said: str  # for readers who see no colours


class Effect(NamedTuple):
    """What one branch changed: on its own part, and on average over the others."""

    stage: Stage
    own: Spill | None
    others: str
    certain: int  # of the others, those that changed for certain
    measured: int  # others


class Matrix(NamedTuple):
    metric: Metric
    stages: tuple[Stage, ...]  # all but the base
    lines: tuple[tuple[str, str, tuple[Spill | None, ...]], ...]  # part, the base's value, a cell per stage
    effects: tuple[Effect, ...]

    @property
    def ratio(self) -> bool:
        """Whether changes are ratios."""
        return any(cell.value.startswith("×") for _, _, cells in self.lines for cell in cells if cell)


def spillover(scores: Scores) -> list[Matrix]:
    """A matrix for every metric that branches were judged by on two parts or more."""
    found = [_matrix(metric, scores) for metric in scores.metrics]
    return [matrix for matrix in found if matrix is not None]


def _matrix(metric: Metric, scores: Scores) -> Matrix | None:
    parts = [subject for subject in metric.subjects if subject.group == "forget"]
    order: tuple[Kind, ...] = ("merged", "branch", "control", "stage")
    stages = sorted(metric.judged(scores.of_kind(*order)), key=lambda stage: order.index(stage.kind))
    branches = [stage for stage in stages if stage.kind == "branch"]
    if len(parts) < 2 or not branches:
        return None
    lines = []
    for part in parts:
        base = metric.cell("base", part.name)
        cells = tuple(_spill(metric, stage, part.name, stage.key == part.branch) for stage in stages)
        lines.append((part.name, metric.shown(base.value) if base else MISSING, cells))
    effects = tuple(_effect(metric, stage, [part.name for part in parts]) for stage in branches)
    return Matrix(metric, tuple(stages), tuple(lines), effects)


def _spill(metric: Metric, stage: Stage, part: str, own: bool) -> Spill | None:
    change = metric.change(stage.key, "base", part)
    if change is None:
        return None
    kind = "own" if own else "spill" if stage.kind == "branch" else stage.kind
    said = {"own": "the branch's own part", "spill": "spillover"}.get(kind, "")
    said = ", ".join(filter(None, (said, "a certain change" if change.way else "no certain change")))
    return Spill(metric.moved(change), metric.moved_interval(change), kind, bool(change.way), said)


def _effect(metric: Metric, stage: Stage, parts: Sequence[str]) -> Effect:
    mine = next((part for part in parts if _branch_of(metric, part) == stage.key), None)
    changes = [metric.change(stage.key, "base", part) for part in parts if part != mine]
    found = [change for change in changes if change is not None]
    return Effect(
        stage=stage,
        own=_spill(metric, stage, mine, True) if mine is not None else None,
        others=metric.moved(_mean(found)) or MISSING,
        certain=sum(change.way != 0 for change in found),
        measured=len(found),
    )


def _branch_of(metric: Metric, part: str) -> str | None:
    return next((subject.branch for subject in metric.subjects if subject.name == part), None)


def _mean(changes: Sequence[Change]) -> Change | None:
    """The mean of differences, the geometric mean of ratios; None where there are none or of both kinds."""
    ratio = bool(changes) and changes[0].ratio
    values = [change.value for change in changes]
    if not changes or any(change.ratio != ratio for change in changes) or not all(map(math.isfinite, values)):
        return None
    if not ratio:
        return Change(fmean(values), None, False)
    return Change(math.exp(fmean(map(math.log, values))), None, True) if min(values) > 0 else None
