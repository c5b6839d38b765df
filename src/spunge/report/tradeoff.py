"""Forgetting against utility: every stage of a run as a point, and the front of those that no other stage beats in both."""

from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import axis_for
from spunge.report.figure import looks, percent
from spunge.report.front import Candidate, Front, Goal, front
from spunge.report.scatter import HEIGHT, grid, placed, spot
from spunge.report.scores import Metric, Scores
from spunge.report.wording import name

LEAST = 3  # points


class TradeOff(NamedTuple):
    svg: str
    said: str
    front: tuple[str, ...]  # the stages on it, by their labels


def trade_off(scores: Scores) -> TradeOff | None:
    """Of all stages where they were judged alike, else without the branches; None of fewer than three."""
    overall = [subject.name for metric in scores.metrics for subject in metric.subjects if subject.group == "together"]
    for models in (scores.models, scores.of_kind("base", "control", "reference", "model", "merged")):
        candidates = [Candidate(0, model.stage, printable(model.label)) for model in models]
        drawn = front([scores], candidates, overall) if len(models) >= LEAST else None
        if drawn is not None:
            return TradeOff(
                svg=_drawn(drawn, scores),
                said=f"To the right: {_said(drawn.forget)}. Upwards: {_said(drawn.keep)}.",
                front=tuple(point.model.label for point in drawn.points if point.front),
            )
    return None


def _said(goal: Goal) -> str:
    over = "the parts to forget" if goal.group == "forget" else "what is to be kept"
    return f"{name(goal.metric)}, mean over {over} ({goal.way} is wanted)"


def _metric(scores: Scores, goal: Goal) -> Metric:
    return next(metric for metric in scores.metrics if metric.name == goal.metric)


def _drawn(drawn: Front, scores: Scores) -> str:
    forget, keep = (_metric(scores, goal) for goal in (drawn.forget, drawn.keep))
    across = axis_for([point.forgotten for point in drawn.points], forget.share)
    up = axis_for([point.kept for point in drawn.points], keep.share)
    told = {
        point.model.stage: f"{point.model.label}: {forget.shown(point.forgotten)} to the right, {keep.shown(point.kept)} upwards"
        f"{', on the front' if point.front else ''}"
        for point in drawn.points
    }
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(HEIGHT + 36), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("aria-label", f"Scatter plot of forgetting against utility. {'; '.join(told.values())}.")
    root.extend(grid(across, up))
    best = sorted((point for point in drawn.points if point.front), key=lambda point: point.forgotten)
    for (x1, y1), (x2, y2) in pairwise([placed(point.forgotten, point.kept, across, up) for point in best]):
        line = {"x1": percent(x1), "y1": str(y1), "x2": percent(x2), "y2": str(y2)}
        root.append(ET.Element("line", {"class": "front", **line}))
    kinds = {model.stage: model.kind for model in scores.models}
    for point in sorted(drawn.points, key=lambda point: kinds[point.model.stage] == "merged"):
        shape = looks(scores)[point.model.stage].shape
        root.append(spot(point.forgotten, point.kept, across, up, shape, told[point.model.stage]))
    return ET.tostring(root, encoding="unicode")
