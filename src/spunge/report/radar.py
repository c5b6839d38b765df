"""A metric as radars: a ring for the base, each control and the merged model, a spoke for each subject of a group.

The paper draws its results so (arXiv 2406.11780, figures 2 to 4). A ring hides its intervals: the dot plot has them.
"""

import math
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import Axis, axis_for
from spunge.report.figure import SHAPES, looks, tick_label
from spunge.report.scores import GROUPS, Metric, Scores, Subject
from spunge.report.wording import MISSING, name, shortened
from spunge.results import Group, Model

LEAST, MOST = 3, 16  # spokes
RADIUS, WIDTH, HEIGHT = 105.0, 380.0, 300.0
NAME = 18  # columns that a spoke's name may take


class Point(NamedTuple):
    x: float
    y: float


def radars(metric: Metric, scores: Scores) -> list[str]:
    """An SVG for each group of three subjects or more; none where a model was not measured on all of them."""
    drawn = []
    models = metric.judged(scores.of_kind("base", "control", "model", "merged"))
    groups: tuple[Group, ...] = ("forget", "keep")
    for group in groups:
        subjects = [subject for subject in metric.subjects if subject.group == group]
        whole = [model for model in models if all(_known(metric, model, subject) for subject in subjects)]
        if LEAST <= len(subjects) <= MOST and len(whole) > 1:
            drawn.append(_radar(metric, group, subjects, whole, scores))
    return drawn


def _known(metric: Metric, model: Model, subject: Subject) -> bool:
    row = metric.row(model.stage, subject.name)
    return row is not None and math.isfinite(row.value)


def _radar(metric: Metric, group: Group, subjects: list[Subject], models: list[Model], scores: Scores) -> str:
    values = {
        model.stage: [row.value for subject in subjects if (row := metric.row(model.stage, subject.name))]
        for model in models
    }
    axis = axis_for([value for each in values.values() for value in each], metric.share)
    root = ET.Element("svg", {"class": "radar", "viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    told = (
        f"{printable(model.label)}: {', '.join(map(metric.shown, values[model.stage])) or MISSING}" for model in models
    )
    named = ", ".join(name(subject.name) for subject in subjects)
    about = f"{printable(metric.name)}, {GROUPS[group].lower()} ({named})"
    root.set("aria-label", f"Radar of {about}. {'; '.join(told)}.")
    root.append(_text(GROUPS[group], Point(0, 14), "group"))
    root.extend(_web(axis, len(subjects)))
    for at, subject in enumerate(subjects):
        place = _place(1.2, at, len(subjects))
        anchor = "middle" if abs(place.x - WIDTH / 2) < 20 else "start" if place.x > WIDTH / 2 else "end"
        root.append(_text(shortened(name(subject.name), NAME), Point(place.x, place.y + 4), "spoke", anchor))
    for model in models:
        shape = looks(scores)[model.stage].shape
        points = [_place(axis.place(value) / 100, at, len(subjects)) for at, value in enumerate(values[model.stage])]
        ring = ET.SubElement(root, "g")
        ET.SubElement(ring, "title").text = printable(model.label)
        ET.SubElement(ring, "path", {"class": f"ring {shape}", "d": _closed(points)})
        for at, point in enumerate(points):
            shown = ET.SubElement(root, "g", {"transform": f"translate({point.x:.1f} {point.y:.1f})"})
            said = f"{name(subjects[at].name)}, {printable(model.label)}: {metric.shown(values[model.stage][at])}"
            ET.SubElement(shown, "title").text = said
            ET.SubElement(shown, "path", {"class": f"mark {shape}", "d": SHAPES[shape]})
    return ET.tostring(root, encoding="unicode")


def _web(axis: Axis, spokes: int) -> list[ET.Element]:
    drawn = []
    step = min((b - a for a, b in pairwise(axis.ticks)), default=1.0)
    for tick in axis.ticks:
        share = axis.place(tick) / 100
        ring = [_place(share, at, spokes) for at in range(spokes)]
        drawn.append(ET.Element("path", {"class": "grid", "d": _closed(ring)}))
        if share:
            label = tick_label(tick, 0 if axis.logarithmic else step)
            drawn.append(_text(label, Point(WIDTH / 2 - 7, ring[0].y + 4), "tick", "end"))
    for at in range(spokes):
        end = _place(1, at, spokes)
        line = {"x1": f"{WIDTH / 2:.1f}", "y1": f"{_middle():.1f}", "x2": f"{end.x:.1f}", "y2": f"{end.y:.1f}"}
        drawn.append(ET.Element("line", {"class": "grid", **line}))
    return drawn


def _middle() -> float:
    return HEIGHT / 2 + 8


def _place(share: float, at: int, spokes: int) -> Point:
    """Where a share of the way out lies on a spoke; the first points up."""
    angle = 2 * math.pi * at / spokes
    return Point(WIDTH / 2 + RADIUS * share * math.sin(angle), _middle() - RADIUS * share * math.cos(angle))


def _closed(points: list[Point]) -> str:
    return f"M{'L'.join(f'{point.x:.1f} {point.y:.1f}' for point in points)}Z"


def _text(content: str, place: Point, kind: str, anchor: str = "start") -> ET.Element:
    style = {"class": kind, "x": f"{place.x:.1f}", "y": f"{place.y:.1f}", "text-anchor": anchor}
    element = ET.Element("text", style)
    element.text = content
    return element
