"""Metrics measured again after attacks, in families: one that differs in a number alone, such as steps, is a curve."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.report.axis import Axis, axis_for
from spunge.report.figure import looks, mark, percent, text, tick_label
from spunge.report.scores import Cell, Metric, Scores, Stage
from spunge.report.wording import MISSING, clean, name, shortened

NUMBER = re.compile(r"\d+(?:\.\d+)?")
POINTS = 3  # at least, for a curve
LABELS = 6  # along a curve, at most
HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 150, 26, 20, 12.0, 4.0  # of a panel: pixels, and percent of its width
NAME = 26  # columns that a panel's title may take


class Point(NamedTuple):
    at: float
    metric: Metric


class Line(NamedTuple):
    """A subject's and a stage's values along a curve, as text."""

    subject: str
    stage: str
    values: tuple[tuple[str, str], ...]  # value, interval


class Attack(NamedTuple):
    """Metrics that tell of one attack; with `points`, as a curve of which the last number differs."""

    name: str
    of: str
    metrics: tuple[Metric, ...]
    points: tuple[Point, ...]


class Back(NamedTuple):
    """What comes back of a metric on a subject, by stage."""

    metric: str
    subject: str
    shares: tuple[str, ...]


def attacks(scores: Scores) -> list[Attack]:
    families: dict[tuple[str, str], list[Metric]] = {}
    for metric in scores.audits:
        families.setdefault((str(metric.of), NUMBER.sub("#", metric.name)), []).append(metric)
    return [_attack(of, metrics, scores) for (of, _), metrics in families.items()]


def _attack(of: str, metrics: Sequence[Metric], scores: Scores) -> Attack:
    numbers = [NUMBER.findall(metric.name) for metric in metrics]
    differ = [place for place, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if len(differ) != 1:
        return Attack(metrics[0].name, of, tuple(metrics), ())
    place = differ[0]
    points = [Point(float(found[place]), metric) for found, metric in zip(numbers, metrics, strict=True)]
    before = scores.metric(of)
    if before is not None and "step" in metrics[0].name and all(point.at for point in points):
        points.append(Point(0.0, before))
    if len(points) < POINTS:
        return Attack(metrics[0].name, of, tuple(metrics), ())
    spans = [match.span() for match in NUMBER.finditer(metrics[0].name)]
    start, stop = spans[place]
    title = f"{metrics[0].name[:start]}N{metrics[0].name[stop:]}"
    return Attack(title, of, tuple(metrics), tuple(sorted(points, key=lambda point: point.at)))


def recovered_table(scores: Scores) -> tuple[tuple[Stage, ...], list[Back]]:
    """Every share of what was forgotten that an attack brings back: the stages, and a line per metric and subject."""
    told = {entry.stage for entry in scores.recovered}
    order = ("merged", "control", "branch", "stage")
    stages = tuple(stage for kind in order for stage in scores.stages if stage.kind == kind and stage.key in told)
    found = {(entry.metric, entry.subject, entry.stage): entry for entry in scores.recovered}
    rows = dict.fromkeys((entry.metric, entry.subject) for entry in scores.recovered)
    lines = []
    for metric, subject in rows:
        entries = [found.get((metric, subject, stage.key)) for stage in stages]
        shares = tuple(MISSING if entry is None else entry.shown for entry in entries)
        lines.append(Back(clean(metric), name(subject), shares))
    return stages, lines


def drawn_stages(attack: Attack, scores: Scores) -> tuple[Stage, ...]:
    """Those that a curve shows: of the attacked ones all but the branches, which would hide the rest."""
    attacked = {stage.key for metric in attack.metrics for stage in metric.judged(scores.stages)}
    stages = (*scores.of_kind("base"), *scores.of_kind("control"), *scores.of_kind("merged"))
    return tuple(stage for stage in stages if stage.key in attacked)


def curve_lines(attack: Attack, scores: Scores) -> list[Line]:
    """The numbers of a curve's table."""
    lines = []
    for subject in attack.metrics[0].subjects:
        for stage in drawn_stages(attack, scores):
            cells = [(p.metric, p.metric.cell(stage.key, subject.name)) for p in attack.points]
            if any(cell is not None for _, cell in cells):
                shown = tuple(
                    (MISSING, "") if cell is None else (m.shown(cell.value), m.interval(cell)) for m, cell in cells
                )
                lines.append(Line(name(subject.name), clean(stage.label), shown))
    return lines


def panels(attack: Attack, scores: Scores) -> list[str]:
    """A small SVG for each subject, all on one scale: the points in equal steps from left to right."""
    values = [x for point in attack.points for x in point.metric.numbers]
    axis = axis_for(values, all(point.metric.share for point in attack.points))
    return [_panel(attack, scores, subject.name, axis) for subject in attack.metrics[0].subjects]


def _panel(attack: Attack, scores: Scores, subject: str, axis: Axis) -> str:
    title = f"{name(subject)}: {clean(attack.name)}"
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(HEIGHT), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("aria-label", title)
    root.append(text(shortened(name(subject), NAME), "0%", 12, "subject"))
    step = min((b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)), default=1.0)
    for tick in axis.ticks:
        y = str(_height(axis, tick))
        places = {"x1": percent(LEFT), "x2": percent(100 - RIGHT / 2), "y1": y, "y2": y}
        ET.SubElement(root, "line", {"class": "grid", **places})
        label = tick_label(tick, 0 if axis.logarithmic else step)
        root.append(text(label, percent(LEFT - 2), int(float(y)) + 4, "tick end"))
    every = -(-len(attack.points) // LABELS)
    for index, point in enumerate(attack.points):
        if index % every == 0:
            root.append(text(f"{point.at:g}", percent(_across(attack, index)), HEIGHT - 4, "tick"))
    for stage in drawn_stages(attack, scores):
        root.extend(_curve(attack, stage, subject, axis, looks(scores)[stage.key].shape))
    return ET.tostring(root, encoding="unicode")


def _curve(attack: Attack, stage: Stage, subject: str, axis: Axis, shape: str) -> list[ET.Element]:
    cells = [(index, point.metric.cell(stage.key, subject)) for index, point in enumerate(attack.points)]
    known: list[tuple[int, Cell]] = [(index, cell) for index, cell in cells if cell is not None]
    spots = [(percent(_across(attack, index)), _height(axis, cell.value)) for index, cell in known]
    drawn = [
        ET.Element("line", {"class": f"whisker {shape}", "x1": x, "y1": str(y), "x2": right, "y2": str(below)})
        for (x, y), (right, below) in pairwise(spots)
    ]
    for (index, cell), (_, y) in zip(known, spots, strict=True):
        metric, at = attack.points[index].metric, attack.points[index].at
        said = f"{name(subject)}, {clean(stage.label)}, {at:g}: {metric.with_interval(cell)}"
        drawn.append(mark(_across(attack, index), y, shape, said))
    return drawn


def _across(attack: Attack, index: int) -> float:
    return LEFT + 3 + (100 - LEFT - 3 - RIGHT) * index / (len(attack.points) - 1)


def _height(axis: Axis, value: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.place(value) / 100), 1)
