"""A scatter plot as inline SVG: places across are percentages and upwards pixels, so that one drawing fits a phone and a desk."""

from itertools import pairwise
from xml.etree import ElementTree as ET

from spunge.errors import printable
from spunge.report.axis import Axis
from spunge.report.figure import mark, percent, text, tick_label

HEIGHT = 360  # pixels of the plot


def placed(x: float, y: float, across: Axis, up: Axis) -> tuple[float, int]:
    """Percent from the left, pixels from the top."""
    return across.place(x), round(HEIGHT * (1 - up.place(y) / 100)) + 10


def spot(x: float, y: float, across: Axis, up: Axis, shape: str, said: str) -> ET.Element:
    """A mark, and what it says of itself."""
    return mark(*placed(x, y, across, up), shape, printable(said))


def labelled(x: float, y: float, across: Axis, up: Axis, label: str) -> ET.Element:
    """A text beside a place, on the side where there is more room."""
    left, top = placed(x, y, across, up)
    drawn = ET.Element("svg", {"x": percent(left), "y": str(top), "overflow": "visible"})
    near_the_end = left > 60
    drawn.append(text(label, "-8" if near_the_end else "8", -7, "subject end" if near_the_end else "subject"))
    return drawn


def grid(across: Axis, up: Axis) -> list[ET.Element]:
    """The lines of both axes, with their numbers."""
    drawn = []
    for axis, sideways in ((across, True), (up, False)):
        step = min((abs(b - a) for a, b in pairwise(axis.ticks)), default=1.0)
        for tick in axis.ticks:
            label = tick_label(tick, 0 if axis.logarithmic else step)
            x, y = percent(axis.place(tick)), round(HEIGHT * (1 - axis.place(tick) / 100)) + 10
            if sideways:
                ends = {"x1": x, "x2": x, "y1": "10", "y2": str(HEIGHT + 10)}
                drawn.append(text(label, x, HEIGHT + 28, "tick"))
            else:
                ends = {"x1": "0%", "x2": "100%", "y1": str(y), "y2": str(y)}
                drawn.append(text(label, "-8", y + 4, "tick end"))
            drawn.append(ET.Element("line", {"class": "grid", **ends}))
    return drawn
