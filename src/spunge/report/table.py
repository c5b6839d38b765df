"""The results as a table: for a terminal, as wide as it allows, and as plain text for a pipe."""

import io
import shutil
from collections.abc import Callable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spunge.errors import printable
from spunge.report.scores import Metric, Scores, Subject, arranged, few_items
from spunge.report.wording import MISSING, aligned, name, shortened
from spunge.results import Group, Model, Results, Row

NAME = 28  # columns that a subject or a metric may take
HEAD = 12  # that a model may take
BRIEFLY: dict[Group, str] = {"forget": "to forget", "together": "together", "keep": "to keep", "worst": "worst of them"}
BELOW = "↓"


class Form(NamedTuple):
    """How much is shown."""

    intervals: tuple[str, ...]  # kinds of models that show theirs
    branches: bool  # each in a column of its own; else only the branch of the line's own part
    controls: bool = True  # every one; else the first
    between: bool = True  # anything but the base and the merged model


# From the fullest to the narrowest.
MOST = ("base", "control", "model", "merged")
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


def results_table(results: Results, width: int | None = None) -> Table:
    """The fullest form that fits into `width` columns (the terminal's by default): a line per metric and subject."""
    scores = arranged(results)
    room = width or shutil.get_terminal_size((100, 24)).columns
    # Measured as if there were no end to the line, so that a table which does not fit says so.
    endless = Console(width=100_000, file=io.StringIO())
    for form in FORMS:
        table = _table(scores, form)
        if Measurement.get(endless, endless.options, table).maximum <= room:
            break
    return table


def results_text(results: Results) -> str:
    """Aligned columns without colour, every stage under its name in results.json, every interval, no line broken."""
    scores = arranged(results)
    lines = [["metric", "subject", "wanted", *(printable(model.stage) for model in scores.models)]]
    for metric in scores.every:
        for subject in metric.subjects:
            rows = [metric.row(model.stage, subject.name) for model in scores.models]
            shown = [MISSING if row is None else _plain(metric, row) for row in rows]
            lines.append([printable(metric.name), name(subject.name), _wanted(subject) or MISSING, *shown])
    notes = [f"note: {told}" for told in (few_items(scores),) if told]
    return aligned(lines) + "".join(f"\n{note}\n" for note in notes)


def _wanted(subject: Subject) -> str:
    return subject.way if subject.wanted == "near" else subject.wanted or ""


def _plain(metric: Metric, row: Row) -> str:
    return metric.with_interval(row) + (" below chance" if row.below_chance else "")


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
            if group != subject.group and (about := _about(metric, subject.group)):
                table.add_row(Text(about, style="dim italic"))
            group = subject.group
            shown = [column.show(metric, subject) for column in columns]
            table.add_row(Text(f"  {shortened(name(subject.name), NAME)}"), *shown)
        table.add_section()
    return table


def _about(metric: Metric, group: Group) -> str:
    """`to forget, wanted: lower`; of the only group its way alone."""
    way = f"wanted: {metric.wanted[group]}" if metric.wanted[group] else ""
    return ", ".join(filter(None, (BRIEFLY[group] if len(metric.wanted) > 1 else "", way)))


def _folded(metric: str) -> Text:
    """A metric's name in lines of at most NAME columns."""
    words = Text(printable(metric), style="bold")
    return Text("\n").join(words.wrap(Console(width=NAME, file=io.StringIO()), NAME))


def _caption(scores: Scores) -> str | None:
    rows = [row for metric in scores.every for row in metric.rows.values()]
    said = [f"{BELOW} below chance"] if any(row.below_chance for row in rows) else []
    said += [f"means over {scores.seeds} seeds, ± their standard deviation"] if scores.seeds > 1 else []
    return "; ".join(filter(None, [*said, few_items(scores)])) or None


class Column(NamedTuple):
    head: Text
    style: str
    show: Callable[[Metric, Subject], Text]


def _columns(scores: Scores, form: Form) -> list[Column]:
    columns = []
    folded = False
    for model in scores.models:
        if not form.between and model.kind not in ("base", "model", "merged"):
            continue
        if not form.controls and model in scores.of_kind("control")[1:]:
            continue
        if model.kind == "branch" and not form.branches:
            if not folded:
                columns.append(Column(Text("own\nbranch"), "", _own))
            folded = True
        else:
            columns.append(Column(_head(model), "bold" if model.kind == "merged" else "", _shower(model, form)))
    return columns


def _head(model: Model) -> Text:
    shown = shortened(name(model.name), HEAD)
    return Text(
        f"{model.kind}\n{shown}"
        if model.kind in ("branch", "control") or model.stage.startswith("reference:")
        else f"\n{shown}"
    )


def _shower(model: Model, form: Form) -> Callable[[Metric, Subject], Text]:
    return lambda metric, subject: _shown(metric, metric.row(model.stage, subject.name), model.kind in form.intervals)


def _own(metric: Metric, subject: Subject) -> Text:
    return _shown(metric, metric.row(subject.branch, subject.name), False) if subject.branch else Text("")


def _shown(metric: Metric, row: Row | None, interval: bool) -> Text:
    if row is None:
        return Text(MISSING, style="dim")
    text = Text(metric.shown(row.value) + (BELOW if row.below_chance else ""))
    bounds = " ".join(filter(None, (metric.interval(row), metric.spread(row)))) if interval else ""
    if bounds:
        text.append(f" {bounds}", style="dim not bold")
    return text
