"""What a search found: tune.json, a table for a terminal, and a page with the points that nothing else beats."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from spunge import __version__
from spunge.errors import printable, redacted
from spunge.files import write_json, write_text
from spunge.report.axis import Axis, axis_for
from spunge.report.figure import SHAPES, LegendLine, percent, text
from spunge.report.page import environment
from spunge.report.scatter import HEIGHT, grid, placed, spot
from spunge.report.scores import LOWER
from spunge.report.wording import MISSING, aligned, name, number, shortened
from spunge.results import Wanted, json_value, merit

FILE, PAGE = "tune.json", "tune.html"
SCHEMA = 1  # rises where a field of tune.json gets another meaning
WIDE = 30  # columns of a name


@dataclass(frozen=True, kw_only=True)
class Score:
    """An objective's value, with its 95% interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some settings, and what they gave on validation items, and on test items where they were chosen."""

    number: int
    values: Mapping[str, Any]  # setting -> value
    scores: tuple[Score, ...] | None = None  # of the objectives; None: it failed
    why: str | None = None  # it failed
    pareto: bool = False  # no other trial is as good by both objectives and better by one
    test: tuple[Score, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """An objective, and which way is good."""

    name: str
    evaluation: str
    metric: str
    subject: str
    wanted: Wanted
    target: float | None = None  # what it should be near, where that is what is wanted

    @property
    def better(self) -> str:
        """`higher is better`."""
        return f"nearer to {self.target:g} is better" if self.wanted == "near" else f"{LOWER[self.wanted]} is better"


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search in its folder."""

    objectives: tuple[Goal, ...]
    ranges: Mapping[str, Any]  # setting -> its range, as the recipe has it
    base: tuple[Score, ...]  # the objectives of the base, on validation items
    trials: tuple[Trial, ...]
    base_test: tuple[Score, ...] | None = None  # the same on test items, where a point was judged

    @property
    def content(self) -> dict[str, Any]:
        """What tune.json holds, as JSON values."""
        return {"schema": SCHEMA, "spunge": __version__, **json_value(self)}

    @property
    def points(self) -> list[Trial]:
        """The Pareto list, by the first objective, the best one first."""
        first = self.objectives[0]

        def best(trial: Trial) -> float:
            return merit(trial.scores[0].value, first.wanted, first.target) if trial.scores else 0.0

        return sorted((each for each in self.trials if each.pareto), key=best, reverse=True)


def write_search(search: Search, folder: Path) -> None:
    """Write tune.json and tune.html."""
    write_json(folder / FILE, search.content)
    write_text(folder / PAGE, redacted(_page(search)))


def search_text(search: Search) -> str:
    """The Pareto list as columns: each point's settings and scores."""
    heads = [f"{goal.name} ({goal.better})" for goal in search.objectives]
    keys = [f"{letter}: {printable(head)}\n" for letter, head in zip("AB", heads, strict=True)]
    judged = search.base_test is not None
    settings = [shortened(name(key), WIDE) for key in search.ranges]
    lines = [["point", *settings, "A", "B", *(["A, test", "B, test"] if judged else [])]]
    lines.append(["base", *("" for _ in search.ranges), *map(shown, search.base), *map(shown, search.base_test or ())])
    for trial in search.points:
        tests = ([shown(score) for score in trial.test] if trial.test else ["", ""]) if judged else []
        settings = [_value(trial.values[key]) for key in search.ranges]
        lines.append([str(trial.number), *settings, *map(shown, trial.scores or ()), *tests])
    failed = [trial for trial in search.trials if trial.why]
    counted = f"{len(search.trials)} trials, {len(search.points)} of them not beaten by another"
    told = f"{counted}; {len(failed)} failed (the first: {failed[0].why})" if failed else counted
    return f"{''.join(keys)}{aligned(lines)}{printable(told)}\n"


def shown(score: Score) -> str:
    """A value with its interval."""
    around = f" [{number(score.low)} {number(score.high)}]" if score.low is not None and score.high is not None else ""
    return f"{number(score.value)}{around}"


def _value(value: Any) -> str:
    plain = number(value) if isinstance(value, float) else str(value)
    return shortened(name(plain), WIDE)


def _page(search: Search) -> str:
    heads = list(search.ranges)
    rows = [
        {
            "number": trial.number,
            "values": [_value(trial.values[key]) for key in heads],
            "scores": [shown(score) for score in trial.scores or ()],
            "why": trial.why,
            "pareto": trial.pareto,
            "test": [shown(score) for score in trial.test or ()],
        }
        for trial in [*search.points, *(trial for trial in search.trials if not trial.pareto)]
    ]
    return (
        environment()
        .get_template("search.html")
        .render(
            search=search,
            heads=heads,
            rows=rows,
            base=[shown(score) for score in search.base],
            plot=_plot(search),
            legend=[
                LegendLine(shape, SHAPES[shape], label)
                for shape, label in (
                    ("base", "base"),
                    ("branch", "trial"),
                    ("merged", "Pareto point, with its number"),
                )
            ],
            base_test=[shown(score) for score in search.base_test or ()],
            missing=MISSING,
        )
    )


def _plot(search: Search) -> str:
    """A scatter plot: the first objective to the right, the second upwards. The table below holds the same numbers."""
    every = [search.base, *(each.scores for each in search.trials if each.scores)]
    across, up = (axis_for([scores[place].value for scores in every], share=False) for place in (0, 1))
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(HEIGHT + 44), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    first, second = search.objectives
    ET.SubElement(root, "title").text = printable(f"{first.name} and {second.name} of {len(search.trials)} trials")
    root.extend(grid(across, up))
    if all(goal.wanted != "near" for goal in search.objectives):  # nearer is no one direction on an axis
        root.extend(_steps(search.points, across, up))
    root.extend(_labels(search.points, across, up))  # below the marks, which they may not hide
    root.extend(_mark(search.base, across, up, "base", "base"))
    for trial in sorted(search.trials, key=lambda trial: trial.pareto):
        if trial.scores:
            settings = ", ".join(f"{key} {_value(value)}" for key, value in trial.values.items())
            shape = "merged" if trial.pareto else "branch"
            root.extend(_mark(trial.scores, across, up, shape, f"{trial.number}: {settings}"))
    return ET.tostring(root, encoding="unicode")


def _labels(points: Sequence[Trial], across: Axis, up: Axis) -> Iterator[ET.Element]:
    """The numbers of the points."""
    for point in points:
        x, y = _place(point.scores or (), across, up)
        label = ET.Element("svg", {"x": percent(x), "y": str(y), "overflow": "visible"})
        label.append(text(str(point.number), "8", -7, "subject"))
        yield label


def _place(scores: Sequence[Score], across: Axis, up: Axis) -> tuple[float, int]:
    """Percent from the left, pixels from the top."""
    return placed(scores[0].value, scores[1].value, across, up)


def _mark(scores: Sequence[Score], across: Axis, up: Axis, shape: str, said: str) -> list[ET.Element]:
    """Nothing where a score is no number."""
    if any(math.isnan(score.value) for score in scores):
        return []
    values = (scores[0].value, scores[1].value)
    return [spot(*values, across, up, shape, f"{said}: {shown(scores[0])}, {shown(scores[1])}")]


def _steps(points: Sequence[Trial], across: Axis, up: Axis) -> list[ET.Element]:
    """From each point to the next: first along one objective, then along the other, as nothing between them was reached."""
    drawn = []
    places = [_place(point.scores, across, up) for point in points if point.scores]
    for (x, y), (next_x, next_y) in pairwise(places):
        # The next is worse by the first objective: what lies between keeps its first and this one's second.
        for ends in ((x, next_x, y, y), (next_x, next_x, y, next_y)):
            sides = dict(zip(("x1", "x2"), map(percent, ends[:2]), strict=True))
            sides |= dict(zip(("y1", "y2"), map(str, ends[2:]), strict=True))
            drawn.append(ET.Element("line", {"class": "chance", **sides}))
    return drawn
