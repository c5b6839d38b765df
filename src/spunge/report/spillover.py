"""What each branch changes besides its own part: the matrix of parts and models, and a line for each branch."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from spunge.report.scores import Metric, Scores, Shift, Subject
from spunge.report.wording import MISSING
from spunge.results import Kind, Model


class Spill(NamedTuple):
    """A cell: what a model has changed on a part, against the base."""

    value: str
    interval: str
    kind: str  # own, spill (a branch's on another part), control, merged or other
    certain: bool
    said: str  # for readers who see no colours


class Effect(NamedTuple):
    """What one branch changed: on its own part, and on average over the others."""

    model: Model
    own: Spill | None
    others: str
    certain: int  # of the others, those that changed for certain
    measured: int  # others


class Matrix(NamedTuple):
    metric: Metric
    models: tuple[Model, ...]  # all but the base
    lines: tuple[tuple[str, str, tuple[Spill | None, ...]], ...]  # part, the base's value, a cell per model
    effects: tuple[Effect, ...]

    @property
    def ratio(self) -> bool:
        """Whether changes are ratios."""
        return any(cell.value.startswith("×") for _, _, cells in self.lines for cell in cells if cell)


def spillover(scores: Scores) -> list[Matrix]:
    """A matrix for every metric that branches were judged by on two parts or more, but for those that are zero everywhere."""
    matrices = [_matrix(metric, scores) for metric in scores.metrics if not metric.zero]
    return [matrix for matrix in matrices if matrix is not None]


def _matrix(metric: Metric, scores: Scores) -> Matrix | None:
    parts = [subject for subject in metric.subjects if subject.group == "forget"]
    order: tuple[Kind, ...] = ("merged", "branch", "control", "other")
    models = sorted(metric.judged(scores.of_kind(*order)), key=lambda model: order.index(model.kind))
    branches = [model for model in models if model.kind == "branch"]
    if len(parts) < 2 or not branches:
        return None
    lines = []
    for part in parts:
        base = metric.row("base", part.name)
        cells = tuple(_spill(metric, model, part.name, model.stage == part.branch) for model in models)
        lines.append((part.name, metric.shown(base.value) if base else MISSING, cells))
    effects = tuple(_effect(metric, model, parts) for model in branches)
    return Matrix(metric, tuple(models), tuple(lines), effects)


def _spill(metric: Metric, model: Model, part: str, own: bool) -> Spill | None:
    shift = metric.shift(model.stage, "base", part)
    if shift is None:
        return None
    kind = "own" if own else "spill" if model.kind == "branch" else model.kind
    said = {"own": "the branch's own part", "spill": "spillover"}.get(kind, "")
    said = ", ".join(filter(None, (said, "a certain change" if shift.way else "no certain change")))
    return Spill(metric.moved(shift), metric.moved_interval(shift), kind, bool(shift.way), said)


def _effect(metric: Metric, model: Model, parts: Sequence[Subject]) -> Effect:
    own = next((part.name for part in parts if part.branch == model.stage), None)
    shifts = [metric.shift(model.stage, "base", part.name) for part in parts if part.name != own]
    known = [shift for shift in shifts if shift is not None]
    return Effect(
        model=model,
        own=_spill(metric, model, own, True) if own is not None else None,
        others=metric.moved(_mean(known)) or MISSING,
        certain=sum(shift.way != 0 for shift in known),
        measured=len(known),
    )


def _mean(shifts: Sequence[Shift]) -> Shift | None:
    """The mean of differences, the geometric mean of ratios; None where there are none or of both kinds."""
    ratio = bool(shifts) and shifts[0].ratio
    values = [shift.value for shift in shifts]
    if not shifts or any(shift.ratio != ratio for shift in shifts) or not all(map(math.isfinite, values)):
        return None
    if not ratio:
        return Shift(fmean(values), None, False)
    return Shift(math.exp(fmean(map(math.log, values))), None, True) if min(values) > 0 else None
