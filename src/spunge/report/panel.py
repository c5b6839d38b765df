"""A small SVG of curves, for several beside each other on one scale: its frame, and where a point stands in it."""

from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree as ET

from spunge.report.axis import Axis
from spunge.report.figure import percent, text, tick_label
from spunge.report.wording import shortened

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 150, 26, 20, 12.0, 4.0  # pixels, and percent of the width
NAME = 26  # columns that a title may take


def frame(name: str, said: str, axis: Axis, ticks: Sequence[tuple[float, str]]) -> ET.Element:
    """An empty panel. said: for those who hear it; ticks: along the curve, each with its share of the way (0..1)."""
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(HEIGHT), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("aria-label", said)
    root.append(text(shortened(name, NAME), "0%", 12, "subject"))
    step = min((b - a for a, b in pairwise(axis.ticks)), default=1.0)
    for tick in axis.ticks:
        y = str(height(axis, tick))
        places = {"x1": percent(LEFT), "x2": percent(100 - RIGHT / 2), "y1": y, "y2": y}
        ET.SubElement(root, "line", {"class": "grid", **places})
        label = tick_label(tick, 0 if axis.logarithmic else step)
        root.append(text(label, percent(LEFT - 2), int(float(y)) + 4, "tick end"))
    for share, label in ticks:
        root.append(text(label, percent(across(share)), HEIGHT - 4, "tick"))
    return root


def line(start: tuple[float, float], end: tuple[float, float], kind: str) -> ET.Element:
    """From one place to another, each as percent from the left and pixels from the top."""
    (x1, y1), (x2, y2) = start, end
    return ET.Element("line", {"class": kind, "x1": percent(x1), "y1": str(y1), "x2": percent(x2), "y2": str(y2)})


def across(share: float) -> float:
    """Percent from the left, of a share of the way (0..1)."""
    return LEFT + 3 + (100 - LEFT - 3 - RIGHT) * share


def height(axis: Axis, value: float) -> float:
    """Pixels from the top."""
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.place(value) / 100), 1)
