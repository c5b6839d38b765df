"""What trainings were measured by on their way: a small panel for each, and the numbers at the step that was saved."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import Axis, axis_for
from spunge.report.figure import SHAPES, LegendLine, mark
from spunge.report.panel import across, frame, height, line
from spunge.report.scores import way_of
from spunge.report.wording import MISSING, duration, isolated, name, number
from spunge.results import Point, Results, Watched

LABELS = 5  # steps that are written along a panel, at most


class Line(NamedTuple):
    """One training's row of the table."""

    training: str
    seed: str
    subject: str
    n: str
    kept: str
    values: tuple[tuple[str, str], ...]  # at the start, at the step that was saved, at the last: value, interval
    share: str


class Curves(NamedTuple):
    """One metric of all trainings."""

    metric: str
    said: str
    panels: tuple[str, ...]
    legend: tuple[LegendLine, ...]
    lines: tuple[Line, ...]
    seeded: bool  # whether there are several seeds
    shared: bool  # whether some of it was to be kept


def curves(results: Results) -> list[Curves]:
    """The metric that is watched, and that beside it."""
    groups: dict[tuple[bool, str, str], list[Watched]] = {}
    for each in results.watched:
        groups.setdefault((each.beside, each.evaluation, each.metric), []).append(each)
    return [_curves(group) for _, group in sorted(groups.items(), key=lambda pair: pair[0][0])]


def _curves(group: Sequence[Watched]) -> Curves:
    values = [end for each in group for point in each.points for end in (point.value, *(_interval(point) or ()))]
    share = all(0 <= value <= 1 for value in values if not math.isnan(value))  # as a share of items lies
    axis = axis_for([value for value in values if math.isfinite(value)], share)
    names = dict.fromkeys(each.training for each in group)
    panels = [_panel([each for each in group if each.training == training], axis, share) for training in names]
    first, shapes = group[0], dict.fromkeys(_shape(each) for each in group)
    told = {"own": "step that was saved of a branch", "control": "of a control"}
    return Curves(
        metric=f"{name(first.metric)} of {name(first.evaluation)}",
        said=_said(group),
        panels=tuple(ET.tostring(panel, encoding="unicode") for panel in panels),
        legend=(
            *(LegendLine(shape, SHAPES[shape], told[shape]) for shape in shapes),
            LegendLine("measured", SHAPES["measured"], "other steps"),
        ),
        lines=tuple(_line(each, share) for each in group),
        seeded=len({each.seed for each in group}) > 1,
        shared=first.beside and any(each.share is not None for each in group),
    )


def _said(group: Sequence[Watched]) -> str:
    """What was measured, and what for."""
    ways = {way_of(each.wanted, each.target) for each in group}
    way = ways.pop() if len(ways) == 1 else ""
    # A training's measurements take one time, whatever they measure.
    taken = (
        "" if group[0].beside else f", in {duration(sum(each.seconds for each in group))} beside the training's time"
    )
    chosen = group[0].keep == "best"
    items = (
        "items that are judged nowhere, by which the saved step was chosen" if chosen else "some of the judged items"
    )
    return f"Measured while it trained, on {items}{taken}.{f' Wanted: {way}.' if way else ''}"


def _interval(point: Point) -> tuple[float, float] | None:
    return None if point.low is None or point.high is None else (point.low, point.high)


def _shape(each: Watched) -> str:
    return "own" if each.training.startswith("branch:") else "control"


def _panel(group: Sequence[Watched], axis: Axis, share: bool) -> ET.Element:
    """One training's curve, of every seed."""
    first, last = group[0], max(1, *(each.trained for each in group))
    steps = sorted({point.step for each in group for point in each.points})
    every = max(1, -(-len(steps) // LABELS))
    ticks = [(_way(step, last), str(step)) for step in steps[::every]]
    root = frame(name(first.name), f"{name(first.name)}: {printable(first.metric)} by step", axis, ticks)
    for each in group:
        root.extend(_curve(each, last, axis, share))
    return root


def _curve(each: Watched, last: int, axis: Axis, share: bool) -> list[ET.Element]:
    known = [point for point in each.points if not math.isnan(point.value)]
    spots = [(across(_way(point.step, last)), height(axis, point.value)) for point in known]
    drawn = [line(start, end, "whisker measured") for start, end in pairwise(spots)]
    marks = []
    for point, (x, y) in zip(known, spots, strict=True):
        if ends := _interval(point):
            drawn.append(line((x, height(axis, ends[0])), (x, height(axis, ends[1])), "whisker measured interval"))
        kept = point.step == each.kept
        value, interval = _shown(point, share)
        saved = ", saved" if kept else ""
        said = f"{name(each.name)}, step {point.step}{saved}: {value} {interval}".rstrip()
        marks.append((kept, mark(x, y, _shape(each) if kept else "measured", said)))
    return drawn + [drawn_mark for _, drawn_mark in sorted(marks, key=lambda pair: pair[0])]


def _way(step: int, last: int) -> float:
    """The share of a training that is done after a step."""
    return min(step, last) / last


def _shown(point: Point | None, share: bool) -> tuple[str, str]:
    if point is None:
        return MISSING, ""
    ends = _interval(point)
    return number(point.value, share), f"[{' '.join(number(end, share) for end in ends)}]" if ends else ""


def _line(each: Watched, share: bool) -> Line:
    at = {point.step: point for point in each.points}
    kept = f"{each.share:.1%}" if each.share is not None else MISSING
    return Line(
        training=name(each.name),
        seed=str(each.seed),
        subject=name(each.subject),
        n=str(each.n),
        kept=f"{each.kept} of {each.trained}",
        values=tuple(_shown(at.get(step), share) for step in (0, each.kept, each.trained)),
        share=f"{kept}; no step keeps {each.asked:.1%}" if each.reached is False else kept,
    )


class Saved(NamedTuple):
    """By which metric the steps that were saved were chosen, in a sentence that begins with it, and the steps."""

    metric: str
    text: str
    lines: tuple[str, ...]


def saved(watched: Sequence[Watched]) -> Saved | None:
    """What is to be said of steps that were chosen; nothing where the last ones were saved."""
    chosen = [each for each in watched if each.keep == "best" and not each.beside]
    if not chosen:
        return None
    first, beside = chosen[0], next((each for each in watched if each.beside), None)
    enough = ""
    if beside is not None and first.asked is not None:
        metric, subject = isolated(beside.metric), isolated(beside.subject)
        enough = f" of the steps that keep {first.asked:.1%} of the base's {metric} on {subject},"
    way = way_of(first.wanted, first.target)
    text = (
        f"chose which step of each training was saved:{enough} the one where it is {_BEST.get(way, f'nearest to {way[5:]}')}, "
        "measured on items that are judged nowhere."
    )
    several = len({each.seed for each in chosen}) > 1
    return Saved(first.metric, text, tuple(_step(each, several) for each in chosen))


_BEST = {"lower": "lowest", "higher": "highest"}


def _step(each: Watched, several: bool) -> str:
    """`asia: step 40 of 80 keeps 96.1%`, or that none kept enough. several: seeds."""
    seed = f" (seed {each.seed})" if several else ""
    line = f"{isolated(each.name)}{seed}: step {each.kept} of {each.trained}"
    if each.share is None:
        return line
    return f"{line} keeps {each.share:.1%}{'' if each.reached else '; no step keeps enough, and it keeps most'}"
