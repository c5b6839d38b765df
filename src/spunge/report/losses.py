"""The losses of each training, step by step, from its log.jsonl: a small panel for each."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.files import parse_json
from spunge.report.axis import Axis, axis_for
from spunge.report.panel import across, frame, height, line
from spunge.report.wording import name, number

POINTS = 80  # of a curve; of more steps each point is the mean of several
LABELS = 4
LARGEST = 1e30  # loss that is drawn; no number, and what a damaged log holds, is not


class _Curve(NamedTuple):
    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


def losses(names: Mapping[Path, str]) -> list[str]:
    """An SVG for each training that has a log, all on one scale. names: a training's folder -> what it is called."""
    curves = []
    for folder, shown_as in names.items():
        curves += _read(folder / "log.jsonl", shown_as)
        # A control may be several trainings: controls/random/random-1, ...
        for file in sorted(folder.glob("*/log.jsonl")):
            curves += _read(file, f"{folder.name}/{file.parent.name}")
    if not curves:
        return []
    axis = axis_for([loss for curve in curves for loss in curve.losses], False)
    return [_panel(curve, axis) for curve in curves]


def _read(file: Path, shown_as: str) -> list[_Curve]:
    """A log's curve. A line that a killed run left unfinished is passed over: nothing depends on a log."""
    known = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    for each in lines:
        try:
            content = parse_json(each)
        except ValueError:
            continue
        step, loss = (content.get("step"), content.get("loss")) if isinstance(content, dict) else (None, None)
        if type(step) is int and step > 0 and isinstance(loss, int | float) and abs(loss) <= LARGEST:
            known[step] = float(loss)  # a run that went on writes some steps again
    if len(known) < 2:
        return []
    steps = sorted(known)
    size = -(-len(steps) // POINTS)
    groups = [steps[at : at + size] for at in range(0, len(steps), size)]
    return [
        _Curve(
            name(shown_as),
            tuple(group[-1] for group in groups),
            tuple(sum(known[step] for step in group) / len(group) for group in groups),
        )
    ]


def _panel(curve: _Curve, axis: Axis) -> str:
    last = curve.steps[-1]
    every = max(1, -(-len(curve.steps) // LABELS))
    ticks = [(step / last, str(step)) for step in curve.steps[::every]]
    said = f"{curve.name}: loss {number(curve.losses[0])} at step {curve.steps[0]}, {number(curve.losses[-1])} at step {last}"
    root = frame(curve.name, printable(said), axis, ticks)
    spots: Sequence[tuple[float, float]] = [
        (across(step / last), height(axis, loss)) for step, loss in zip(curve.steps, curve.losses, strict=True)
    ]
    root.extend(line(start, end, "whisker measured") for start, end in pairwise(spots))
    return ET.tostring(root, encoding="unicode")
