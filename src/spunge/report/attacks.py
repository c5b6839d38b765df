"""Metrics measured again under attacks; those that are points of one curve, such as numbers of steps, together."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import Axis, axis_for
from spunge.report.figure import looks, mark
from spunge.report.panel import across, frame, height, line
from spunge.report.scores import Metric, Scores, share_back
from spunge.report.wording import MISSING, name
from spunge.results import Model, Row

POINTS = 3  # at least, for a curve
LABELS = 6  # along a curve, at most


class Point(NamedTuple):
    at: float
    metric: Metric


class CurveLine(NamedTuple):
    """A subject's and a model's values along a curve, as text."""

    subject: str
    model: str
    values: tuple[tuple[str, str], ...]  # value, interval


class Family(NamedTuple):
    """Metrics that tell of one attack; with `points`, as a curve."""

    name: str
    metrics: tuple[Metric, ...]
    points: tuple[Point, ...]


class SharesBack(NamedTuple):
    """What comes back of a metric on a subject, by model."""

    metric: str
    subject: str
    shares: tuple[str, ...]


def families(scores: Scores) -> list[Family]:
    by_curve: dict[tuple[str | None, str], list[Metric]] = {}
    for metric in scores.audits:
        by_curve.setdefault((metric.of, metric.curve or metric.name), []).append(metric)
    return [_family(metrics, scores) for metrics in by_curve.values()]


def _family(metrics: Sequence[Metric], scores: Scores) -> Family:
    first = metrics[0]
    points = [Point(metric.at, metric) for metric in metrics if metric.at is not None]
    before = scores.metric(str(first.of))
    # No step of an attack leaves the model as it is.
    if before is not None and first.unit == "steps" and all(point.at for point in points):
        points.append(Point(0.0, before))
    if first.curve is None or len(points) < POINTS:
        return Family(first.name, tuple(metrics), ())
    return Family(first.curve, tuple(metrics), tuple(sorted(points, key=lambda point: point.at)))


def recovered_table(scores: Scores) -> tuple[tuple[Model, ...], list[SharesBack]]:
    """Every share of what was forgotten that an attack brings back: the models, and a line per metric and subject."""
    order = ("merged", "control", "branch", "reference", "model", "other")
    known = {row.stage for row in scores.recovered}
    models = tuple(model for kind in order for model in scores.models if model.kind == kind and model.stage in known)
    by_place = {(row.metric, row.subject, row.stage): row for row in scores.recovered}
    lines = []
    for metric, subject in dict.fromkeys((row.metric, row.subject) for row in scores.recovered):
        rows = [by_place.get((metric, subject, model.stage)) for model in models]
        shares = tuple(MISSING if row is None else share_back(row) for row in rows)
        lines.append(SharesBack(printable(metric), name(subject), shares))
    return models, lines


def drawn_models(family: Family, scores: Scores) -> tuple[Model, ...]:
    """Those that a curve shows: of the attacked ones all but the branches, which would hide the rest."""
    attacked = {model.stage for metric in family.metrics for model in metric.judged(scores.models)}
    models = scores.of_kind("base", "reference", "model", "control", "merged")
    return tuple(model for model in models if model.stage in attacked)


def curve_lines(family: Family, scores: Scores) -> list[CurveLine]:
    """The numbers of a curve's table."""
    lines = []
    for subject in family.metrics[0].subjects:
        for model in drawn_models(family, scores):
            rows = [(point.metric, point.metric.row(model.stage, subject.name)) for point in family.points]
            if any(row is not None for _, row in rows):
                shown = tuple(
                    (MISSING, "") if row is None else (m.shown(row.value), m.interval(row)) for m, row in rows
                )
                lines.append(CurveLine(name(subject.name), printable(model.label), shown))
    return lines


def panels(family: Family, scores: Scores) -> list[str]:
    """A small SVG for each subject, all on one scale: the points in equal steps from left to right."""
    values = [x for point in family.points for x in point.metric.numbers]
    axis = axis_for(values, all(point.metric.share for point in family.points))
    return [_panel(family, scores, subject.name, axis) for subject in family.metrics[0].subjects]


def _panel(family: Family, scores: Scores, subject: str, axis: Axis) -> str:
    every = -(-len(family.points) // LABELS)
    ticks = [
        (_share(family, index), f"{point.at:g}") for index, point in enumerate(family.points) if index % every == 0
    ]
    root = frame(name(subject), f"{name(subject)}: {printable(family.name)}", axis, ticks)
    for model in drawn_models(family, scores):
        root.extend(_curve(family, model, subject, axis, looks(scores)[model.stage].shape))
    return ET.tostring(root, encoding="unicode")


def _curve(family: Family, model: Model, subject: str, axis: Axis, shape: str) -> list[ET.Element]:
    rows = [(index, point.metric.row(model.stage, subject)) for index, point in enumerate(family.points)]
    known: list[tuple[int, Row]] = [(index, row) for index, row in rows if row is not None]
    spots = [(across(_share(family, index)), height(axis, row.value)) for index, row in known]
    drawn = [line(start, end, f"whisker {shape}") for start, end in pairwise(spots)]
    for (index, row), (x, y) in zip(known, spots, strict=True):
        metric, at = family.points[index].metric, family.points[index].at
        said = f"{name(subject)}, {printable(model.label)}, {at:g}: {metric.with_interval(row)}"
        drawn.append(mark(x, y, shape, said))
    return drawn


def _share(family: Family, index: int) -> float:
    return index / (len(family.points) - 1)
