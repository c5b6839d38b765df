"""A comparison of runs as people read it: text for a terminal, CSV for a spreadsheet, one HTML page."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spunge.errors import printable, redacted
from spunge.files import write_text
from spunge.report.axis import axis_for
from spunge.report.comparison import Comparison
from spunge.report.export import spreadsheet
from spunge.report.figure import CONTROLS, SHAPES, LegendLine
from spunge.report.front import Front, Goal, Point, together
from spunge.report.page import environment
from spunge.report.scatter import HEIGHT, grid, labelled, spot
from spunge.report.wording import MISSING, aligned, name, number, shortened
from spunge.results import Difference, Row

NAME = 40  # columns that a name may take
VALUE = 32  # that a setting's value may take
KINDS = ("merged", *CONTROLS, "other")  # how runs are drawn, in turn


def comparison_text(compared: Comparison) -> str:
    """A line per metric and subject, a column for the base and for each run; then what differs between the recipes, the items'
    paired differences, the front, and what to mind."""
    runs = [printable(run.name) for run in compared.runs]
    lines = [["metric", "subject", "wanted", "base", *runs], ["", "", "", "", *map(printable, compared.headings)]]
    for line in compared.lines():
        shown = (MISSING if row is None else line.metric.with_interval(row) for row in (line.base, *line.rows))
        lines.append([_short(line.metric.name), _short(line.subject), line.way, *shown])
    sections = [aligned(lines), _settings_text(compared, runs), _pairs_text(compared, runs), _front_text(compared)]
    notes = "".join(f"note: {printable(note)}\n" for note in compared.notes())
    return "\n".join(section for section in (*sections, notes) if section)


def _settings_text(compared: Comparison, runs: Sequence[str]) -> str:
    if not compared.settings:
        return ""
    lines = [["what differs", *runs]]
    for setting in compared.settings:
        values = (MISSING if value is None else shortened(name(value), VALUE) for value in setting.values)
        lines.append([_short(setting.name), *values])
    return aligned(lines)


def _pairs_text(compared: Comparison, runs: Sequence[str]) -> str:
    lines = [["paired by item", "", *(f"{run} - {runs[0]}" for run in runs[1:])]]
    for metric, subject, shifts in compared.pairs():
        shown = (f"{metric.moved(shift)} {metric.moved_interval(shift)}".strip() or MISSING for shift in shifts)
        lines.append([_short(metric.name), _short(subject), *shown])
    return aligned(lines) if len(lines) > 1 else ""


def _front_text(compared: Comparison) -> str:
    drawn = compared.front()
    if drawn is None:
        return ""
    lines = [["on the front", "model", *(_goal(goal) for goal in (drawn.forget, drawn.keep))]]
    for point in sorted(drawn.points, key=lambda each: not each.front):
        told = ["yes" if point.front else "no", _short(point.model.label), *_means(compared, drawn, point)]
        lines.append(told)
    return aligned(lines)


def _goal(goal: Goal) -> str:
    """`accuracy on what is to be forgotten (lower)`."""
    what = "to forget" if goal.group == "forget" else "to keep"
    subjects = f"mean of {len(goal.subjects)}" if len(goal.subjects) > 1 else name(goal.subjects[0])
    return f"{_short(goal.metric)}, {what}: {subjects} ({goal.way} is better)"


def _means(compared: Comparison, drawn: Front, point: Point) -> list[str]:
    scores = [run.scores for run in compared.runs]
    values = ((drawn.forget, point.forgotten), (drawn.keep, point.kept))
    return [together(scores, goal.metric).shown(value) for goal, value in values]


def _shares(compared: Comparison, drawn: Front) -> tuple[bool, bool]:
    scores = [run.scores for run in compared.runs]
    return together(scores, drawn.forget.metric).share, together(scores, drawn.keep.metric).share


def _short(value: str) -> str:
    return shortened(name(value), NAME)


# ---- CSV


def comparison_csv(compared: Comparison) -> str:
    """A line a score: run, stage, how the model was made, metric, subject, value, interval; then the difference from the first
    run's on the same items, where they were paired."""
    head = ["run", "stage", "made_by", "metric", "subject", "group", "wanted", "target", "value", "low", "high", "n"]
    differing = ["difference", "difference_kind", "difference_low", "difference_high"]
    rows: list[list[Any]] = []
    paired = {(each.run, each.difference.metric, each.difference.subject): each.difference for each in compared.paired}
    for line in compared.lines():
        scores: list[tuple[str, str, str, Row | None, Difference | None]] = [("", "base", "", line.base, None)]
        for place, (finished, made, row) in enumerate(zip(compared.runs, compared.headings, line.rows, strict=True)):
            pair = paired.get((place, line.metric.name, line.subject))
            scores.append((finished.name, compared.stage, made, row, pair))
        for run, stage, made, row, pair in scores:
            if row is not None:
                about = [run, stage, made, row.metric, row.subject, row.group, line.wanted, line.target]
                more = [pair.value, pair.kind, pair.low, pair.high] if pair else [None] * len(differing)
                rows.append([*about, row.value, row.low, row.high, row.n, *more])
    return spreadsheet([*head, *differing], rows)


# ---- the page


def write_comparison(compared: Comparison, file: Path) -> None:
    """Write the comparison as one page that opens offline. Raises RecipeError where it cannot be written."""
    write_text(file, comparison_page(compared))


def comparison_page(compared: Comparison) -> str:
    """HTML; everything from the runs is escaped, nothing is fetched and nothing runs."""
    drawn = compared.front()
    html = (
        environment()
        .get_template("compared.html")
        .render(
            stage=compared.stage,
            runs=[run.name for run in compared.runs],
            headings=compared.headings,
            lines=[_row(line) for line in compared.lines()],
            settings=compared.settings,
            pairs=list(_pair_rows(compared)),
            front=drawn,
            goals=[_goal(goal) for goal in (drawn.forget, drawn.keep)] if drawn else [],
            points=[(point, _means(compared, drawn, point)) for point in drawn.points] if drawn else [],
            plot=Markup(_plot(drawn, _shares(compared, drawn))) if drawn else "",  # noqa: S704 - built by ElementTree, which escapes
            legend=_legend(compared),
            notes=compared.notes(),
            missing=MISSING,
        )
    )
    return redacted(html)


def _row(line: Any) -> dict[str, Any]:
    cells = [
        ("", "") if row is None else (line.metric.shown(row.value), line.metric.interval(row))
        for row in (line.base, *line.rows)
    ]
    return {"metric": line.metric.name, "subject": line.subject, "way": line.way, "cells": cells}


def _pair_rows(compared: Comparison) -> Iterator[dict[str, Any]]:
    for metric, subject, shifts in compared.pairs():
        cells = [
            (metric.moved(each), metric.moved_interval(each), each is not None and each.way != 0) for each in shifts
        ]
        yield {"metric": metric.name, "subject": subject, "cells": cells}


def shape(place: int) -> str:
    """How a run is drawn."""
    return KINDS[place % len(KINDS)]


def _legend(compared: Comparison) -> list[LegendLine]:
    runs = [LegendLine(shape(place), SHAPES[shape(place)], name(run.name)) for place, run in enumerate(compared.runs)]
    controls = LegendLine("branch", SHAPES["branch"], "a control of one of them")
    return [LegendLine("base", SHAPES["base"], "base"), *runs, controls]


def _plot(drawn: Front, shares: tuple[bool, bool]) -> str:
    """A scatter plot: what is to be forgotten to the right, what is to be kept upwards. The table below has the same numbers.

    shares: whether all values of either metric lie in 0 to 1.
    """
    across = axis_for([point.forgotten for point in drawn.points], shares[0])
    up = axis_for([point.kept for point in drawn.points], shares[1])
    root = ET.Element("svg", {"class": "chart", "width": "100%", "height": str(HEIGHT + 44), "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "title").text = printable(
        f"{drawn.forget.metric} and {drawn.keep.metric}, {len(drawn.points)} models"
    )
    root.extend(grid(across, up))
    for place, point in enumerate(drawn.points, start=1):
        if point.front:
            root.append(labelled(point.forgotten, point.kept, across, up, str(place)))
    for point in drawn.points:
        control = point.model.stage.startswith("control:")
        kind = "base" if point.model.stage == "base" else "branch" if control else shape(point.model.run)
        said = f"{name(point.model.label)}: {number(point.forgotten)}, {number(point.kept)}"
        root.append(spot(point.forgotten, point.kept, across, up, kind, said))
    return ET.tostring(root, encoding="unicode")
