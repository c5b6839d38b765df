"""A metric as an inline SVG: a band per subject, a lane per kind of model, a mark at the value, a whisker beside it.

Places along the axis are percentages and nothing is scaled, so one drawing fits a phone and a desk, with text of one
size. Shapes as well as colours tell the models apart; colours are near Okabe and Ito's, set by the page's style.
"""

import math
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import Axis, axis_for
from spunge.report.scores import GROUPS, Metric, Scores, Subject, interval
from spunge.report.wording import MISSING, name, number, shortened
from spunge.results import Model, Row

LANE, LABEL, GAP, TOP, GROUP = 12, 18, 10, 24, 24  # pixels
NAME = 30  # columns that a subject may take
SHAPES = {
    "base": "M-4.5 0A4.5 4.5 0 1 0 4.5 0 4.5 4.5 0 1 0-4.5 0Z",
    "reference": "M-4.2-4.2H4.2V4.2H-4.2Z",
    "own": "M0-5.5 5.5 0 0 5.5-5.5 0Z",
    "branch": "M-1-4.5H1V4.5H-1Z",
    "control": "M-4-4H4V4H-4Z",
    "second": "M0-5 5 4H-5Z",
    "third": "M0 5 5-4H-5Z",
    "fourth": "M-1.8-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",
    "merged": "M-5 0A5 5 0 1 0 5 0 5 5 0 1 0-5 0Z",
    "other": "M-4-4 4 4M4-4-4 4",
    "measured": "M-2.2 0A2.2 2.2 0 1 0 2.2 0 2.2 2.2 0 1 0-2.2 0Z",
}


CONTROLS = ("control", "second", "third", "fourth")  # beyond these they repeat


class Look(NamedTuple):
    """How a model is drawn: its shape's and colour's name, and its lane from the top."""

    shape: str
    lane: int


class LegendLine(NamedTuple):
    """A shape and what it stands for."""

    shape: str
    path: str
    label: str


def looks(scores: Scores) -> dict[str, Look]:
    """Stage -> look of its model. All branches share a lane; every other model has its own."""
    by_stage: dict[str, Look] = {}
    lanes: dict[str, int] = {}
    controls = scores.of_kind("control", "model")
    order = ("base", "reference", "model", "branch", "control", "other", "merged")
    for model in sorted(scores.models, key=lambda model: order.index(model.kind)):
        lane = lanes.setdefault(model.kind if model.kind == "branch" else model.stage, len(lanes))
        shape = CONTROLS[controls.index(model) % len(CONTROLS)] if model in controls else model.kind
        by_stage[model.stage] = Look(shape, lane)
    return by_stage


def legend(scores: Scores, metric: Metric | None = None, branch: str = "own") -> list[LegendLine]:
    """Of the models that a metric was measured on; of all without one. branch: `own` where a part's own branch is told from the
    others, `branch` where all look alike."""
    drawn = looks(scores)
    shapes = []
    models = metric.judged(scores.models) if metric else scores.models
    for model in sorted(models, key=lambda model: drawn[model.stage].lane):
        if model.kind != "branch":
            shapes.append((drawn[model.stage].shape, printable(model.label)))
        elif branch == "branch":
            shapes += [] if ("branch", "branches") in shapes else [("branch", "branches")]
        elif ("own", "branch of this part") not in shapes:
            shapes += [("own", "branch of this part"), ("branch", "other branches")]
    return [LegendLine(shape, SHAPES[shape], label) for shape, label in shapes]


def figure(metric: Metric, scores: Scores, identifier: str) -> str:
    """SVG text, well-formed as XML; `identifier` makes its ids unique in the page."""
    axis = axis_for(metric.numbers, metric.share)
    judged = {model.stage: looks(scores)[model.stage] for model in metric.judged(scores.models)}
    lanes = sorted({look.lane for look in judged.values()})
    drawn = {stage: Look(look.shape, lanes.index(look.lane)) for stage, look in judged.items()}
    parts: list[ET.Element] = []
    y, group = TOP, None
    for subject in metric.subjects:
        if subject.group != group and len({subject.group for subject in metric.subjects}) > 1:
            parts.append(text(GROUPS[subject.group], "0%", y + 12, "group"))
            y += GROUP
        group = subject.group
        parts += _band(metric, subject, scores, drawn, axis, y)
        y += LABEL + len(lanes) * LANE + GAP
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(y + 4), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("aria-labelledby", f"{identifier}-title {identifier}-desc")
    ET.SubElement(root, "title", {"id": f"{identifier}-title"}).text = f"{printable(metric.name)} by subject and stage"
    ET.SubElement(root, "desc", {"id": f"{identifier}-desc"}).text = _described(metric, axis)
    root.extend(_grid(axis, y) + _chance(metric, axis, y))
    root.extend(parts)
    return ET.tostring(root, encoding="unicode")


def _described(metric: Metric, axis: Axis) -> str:
    wanted = f"{metric.direction} " if metric.direction else ""
    scale = "logarithmic axis" if axis.logarithmic else "axis"
    return (
        f"Dot plot of {len(metric.subjects)} subjects, {scale} from {number(axis.low)} to {number(axis.high)}. "
        f"{wanted}Whiskers are 95% intervals. The table below holds the same numbers."
    )


def _chance(metric: Metric, axis: Axis, bottom: int) -> list[ET.Element]:
    """A line where guessing would land."""
    if metric.chance is None or not axis.low <= metric.chance <= axis.high:
        return []
    x = percent(axis.place(metric.chance))
    return [ET.Element("line", {"class": "chance", "x1": x, "x2": x, "y1": str(TOP - 6), "y2": str(bottom)})]


def _grid(axis: Axis, bottom: int) -> list[ET.Element]:
    step = min((abs(b - a) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)), default=1.0)
    drawn = []
    for tick in axis.ticks:
        x = percent(axis.place(tick))
        drawn.append(ET.Element("line", {"class": "grid", "x1": x, "x2": x, "y1": str(TOP - 6), "y2": str(bottom)}))
        drawn.append(text(tick_label(tick, 0 if axis.logarithmic else step), x, TOP - 11, "tick"))
    return drawn


def tick_label(value: float, step: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9)) + (step == 0.25)}f}" if step else f"{value:g}"


def _band(
    metric: Metric, subject: Subject, scores: Scores, drawn: dict[str, Look], axis: Axis, top: int
) -> list[ET.Element]:
    base, merged = metric.row("base", subject.name), metric.row("merged", subject.name)
    band = [text(shortened(name(subject.name), NAME), "0%", top + 12, "subject")]
    if shortened(name(subject.name), NAME) != name(subject.name):
        ET.SubElement(band[0], "title").text = name(subject.name)
    if base is not None and merged is not None:
        band.append(text(f"{metric.shown(base.value)} → {metric.shown(merged.value)}", "100%", top + 12, "change"))
    marks: list[ET.Element] = []
    # What tells most is drawn last: other branches lie below the part's own.
    for model in sorted(scores.models, key=lambda model: (model.stage == subject.branch, model.kind == "merged")):
        row = metric.row(model.stage, subject.name)
        if row is None:
            continue
        look = drawn[model.stage]
        shape = "own" if model.stage == subject.branch else look.shape
        y = top + LABEL + look.lane * LANE + LANE // 2
        ends = interval(row)
        if ends and shape != "branch":
            band.append(_whisker(axis.place(ends.low), axis.place(ends.high), y, shape))
        marks.append(mark(axis.place(row.value), y, shape, _said(metric, subject, model, row)))
    return band + marks


def _said(metric: Metric, subject: Subject, model: Model, row: Row) -> str:
    count = f", n = {row.n}" if row.n is not None else ""
    off = "" if math.isfinite(row.value) else " (beyond the axis)"
    return f"{name(subject.name)}, {printable(model.label)}: {metric.with_interval(row) or MISSING}{off}{count}"


def _whisker(low: float, high: float, y: int, shape: str) -> ET.Element:
    places = {"x1": percent(low), "x2": percent(high), "y1": str(y), "y2": str(y)}
    return ET.Element("line", {"class": f"whisker {shape}", **places})


def mark(x: float, y: float, shape: str, said: str) -> ET.Element:
    # A nested drawing puts any shape at a percentage, which a transform cannot.
    place = ET.Element("svg", {"x": percent(x), "y": str(y), "overflow": "visible"})
    ET.SubElement(place, "title").text = said
    ET.SubElement(place, "path", {"class": f"mark {shape}", "d": SHAPES[shape]})
    return place


def text(content: str, x: str, y: int, kind: str) -> ET.Element:
    element = ET.Element("text", {"class": kind, "x": x, "y": str(y)})
    element.text = content
    return element


def percent(value: float) -> str:
    return f"{value:.2f}%"
