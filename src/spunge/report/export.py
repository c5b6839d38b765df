"""The scores for other programs: CSV that pandas and a spreadsheet read without care, and Markdown for a note or an issue."""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from spunge.errors import printable
from spunge.report.scores import Metric, Subject, arranged
from spunge.report.text import report_text
from spunge.report.wording import MISSING, name
from spunge.results import Model, Results, Row
from spunge.weights.card import markdown

# Of the model that a row is of, in front of the row's own: what runs differ by when they are stacked.
OF_MODEL = ("kind", "name", "base", "method", "rule", "density", "scale")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula to a spreadsheet
ROW = tuple(each.name for each in dataclasses.fields(Row) if each.name != "stage")


def csv_text(results: Results) -> str:
    """A line a score, a head above: the stage, what made its model, and all fields of results.json's rows."""
    models = {model.stage: model for model in results.models}
    head = ["stage", *(f"model_{field}" if field == "name" else field for field in OF_MODEL), *ROW]
    return spreadsheet(head, (_values(row, models.get(row.stage)) for row in results.rows))


def spreadsheet(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """CSV. A text that a spreadsheet would take for a formula has an apostrophe in front."""
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(head)
    lines.writerows([cell(value) for value in row] for row in rows)
    return written.getvalue()


def _values(row: Row, model: Model | None) -> Iterator[Any]:
    yield row.stage
    yield from (None if model is None else getattr(model, field) for field in OF_MODEL)
    yield from (getattr(row, field) for field in ROW)


def cell(value: Any) -> Any:
    """As a spreadsheet takes it: no formula, nothing for None."""
    if not isinstance(value, str):
        return "" if value is None else value
    shown = printable(value)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


def markdown_text(results: Results) -> str:
    """The table of scores with intervals, and what they say."""
    scores = arranged(results)
    lines = markdown_table(scores.every, {model.stage: model.stage for model in scores.models})
    return printable("\n".join([*lines, "", "```", report_text(results).strip("\n"), "```", ""]), keep="\n")


def markdown_table(
    metrics: Iterable[Metric],
    stages: Mapping[str, str],
    subjects: Callable[[Metric], Iterable[Subject]] = lambda metric: metric.subjects,
) -> Iterator[str]:
    """A line a metric and subject, a head above. stages: those that have a column, and what it is called."""
    head = ["metric", "subject", "wanted", *map(markdown, stages.values())]
    yield _line(head)
    yield f"|{'---|' * len(head)}"
    for metric in metrics:
        for subject in subjects(metric):
            rows = [metric.row(stage, subject.name) for stage in stages]
            cells = [MISSING if row is None else metric.with_interval(row) for row in rows]
            told = [markdown(metric.name), markdown(name(subject.name)), subject.way if subject.wanted else MISSING]
            yield _line([*told, *cells])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
