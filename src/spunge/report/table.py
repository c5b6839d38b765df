"""The results as a table: for a terminal, as wide as it allows, and as plain text for a pipe."""

import io
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spunge.report.reading import read_scores
from spunge.report.scores import Cell, Group, Metric, Scores, Stage, Subject
from spunge.report.wording import MISSING, aligned, clean, name, shortened

NAME = 28  # columns that a subject or a metric may take
HEAD = 12  # that a stage may take
BRIEFLY: dict[Group, str] = {"forget": "to forget", "mixed": "together", "other": "to keep", "worst": "worst of them"}
BELOW = "↓"


class Form(NamedTuple):
    """How much is shown."""

    intervals: tuple[str, ...]  # kinds of stages that show theirs
    branches: bool  # each in a column of its own; else only the branch of the line's own part
    controls: bool = True  # every one; else the first
    between: bool = True  # anything but the base and the merged model


# From the fullest to the narrowest.
MOST = ("base", "control", "merged")
FORMS = (
    Form(MOST, True),
    Form(("merged",), True),
    Form(MOST, False),
    Form((), True),
    Form(("merged",), False),
    Form((), False),
    Form(("merged",), False, controls=False),
    Form((), False, controls=False),
    Form((), False, between=False),
)


def results_table(results: Mapping[str, Any], width: int | None = None) -> Table:
    """The fullest form that fits into `width` columns (the terminal's by default): a line per metric and subject."""
    scores = read_scores(results)
    room = width or shutil.get_terminal_size((100, 24)).columns
    # Measured as if there were no end to the line, so that a table which does not fit says so.
    endless = Console(width=100_000, file=io.StringIO())
    for form in FORMS:
        table = _table(scores, form)
        if Measurement.get(endless, endless.options, table).maximum <= room:
            break
    return table


def results_text(results: Mapping[str, Any]) -> str:
    """Aligned columns without colour, every stage under its name in results.json, every interval, no line broken."""
    scores = read_scores(results)
    lines = [["metric", "subject", *(clean(stage.key) for stage in scores.stages)]]
    for metric in scores.every:
        for subject in metric.subjects:
            cells = [metric.cell(stage.key, subject.name) for stage in scores.stages]
            shown = [MISSING if cell is None else _plain(metric, cell) for cell in cells]
            lines.append([clean(metric.name), name(subject.name), *shown])
    return aligned(lines)


def _plain(metric: Metric, cell: Cell) -> str:
    return metric.with_interval(cell) + (" below chance" if cell.below_chance else "")


def _table(scores: Scores, form: Form) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=_caption(scores))
    table.caption_justify = "left"
    # Where nothing fits, names are wrapped and cut; a number never is.
    table.add_column("metric\n  subject", overflow="ellipsis")
    columns = _columns(scores, form)
    for column in columns:
        table.add_column(column.head, no_wrap=True, style=column.style)
    for metric in scores.every:
        group = None
        table.add_row(_folded(metric.name))
        for subject in metric.subjects:
            if group != subject.group and len({subject.group for subject in metric.subjects}) > 1:
                table.add_row(Text(BRIEFLY[subject.group], style="dim italic"))
            group = subject.group
            shown = [column.show(metric, subject) for column in columns]
            table.add_row(Text(f"  {shortened(name(subject.name), NAME)}"), *shown)
        table.add_section()
    return table


def _folded(metric: str) -> Text:
    """A metric's name in lines of at most NAME columns."""
    words = Text(clean(metric), style="bold")
    return Text("\n").join(words.wrap(Console(width=NAME, file=io.StringIO()), NAME))


def _caption(scores: Scores) -> str | None:
    cells = [cell for metric in scores.every for cell in metric.cells.values()]
    said = [f"{BELOW} below chance"] if any(cell.below_chance for cell in cells) else []
    said += [f"means over {scores.seeds} seeds, ± their standard deviation"] if scores.seeds > 1 else []
    return "; ".join(said) or None


class Column(NamedTuple):
    head: Text
    style: str
    show: Callable[[Metric, Subject], Text]


def _columns(scores: Scores, form: Form) -> list[Column]:
    columns = []
    folded = False
    for stage in scores.stages:
        if not form.between and stage.kind not in ("base", "merged"):
            continue
        if not form.controls and stage in scores.of_kind("control")[1:]:
            continue
        if stage.kind == "branch" and not form.branches:
            if not folded:
                columns.append(Column(Text("own\nbranch"), "", _own))
            folded = True
        else:
            columns.append(Column(_head(stage), "bold" if stage.kind == "merged" else "", _shower(stage, form)))
    return columns


def _head(stage: Stage) -> Text:
    shown = shortened(name(stage.name), HEAD)
    return Text(f"{stage.kind}\n{shown}" if stage.kind in ("branch", "control") else f"\n{shown}")


def _shower(stage: Stage, form: Form) -> Callable[[Metric, Subject], Text]:
    return lambda metric, subject: _shown(metric, metric.cell(stage.key, subject.name), stage.kind in form.intervals)


def _own(metric: Metric, subject: Subject) -> Text:
    return _shown(metric, metric.cell(subject.branch, subject.name), False) if subject.branch else Text("")


def _shown(metric: Metric, cell: Cell | None, interval: bool) -> Text:
    if cell is None:
        return Text(MISSING, style="dim")
    text = Text(metric.shown(cell.value) + (BELOW if cell.below_chance else ""))
    bounds = " ".join(filter(None, (metric.interval(cell), metric.spread(cell)))) if interval else ""
    if bounds:
        text.append(f" {bounds}", style="dim not bold")
    return text
