"""The rows that an evaluation measures, and the subjects that each of them counts for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from spunge.data.attribute import subjects_of
from spunge.data.attribution import attribute_of
from spunge.data.query import ROW, Query
from spunge.data.rows import read_rows
from spunge.data.samples import sample_table, table_sha256
from spunge.data.split import draw, rendering_of, seed_for, tools_of
from spunge.data.tables import taken
from spunge.data.texts import blank, refuse_files_without, refuse_other_types
from spunge.errors import RecipeError
from spunge.recipe.schema import AttributeSettings, EvaluatorSettings, Recipe, evaluation_name

EVERYTHING = "all"
TEXTS = (
    "text",
    "prompt",
    "completion",
    "question",
    "reference",
    "paraphrased",
)  # roles that are texts in every evaluator
SCORED = ("text", "completion", "paraphrased")  # of which an empty one gives nothing to measure
SAMPLES = ({"prompt", "completion"}, {"messages"})  # roles of texts that are scored as they would be learned


@dataclass(frozen=True)
class Items:
    name: str
    settings: EvaluatorSettings
    table: pa.Table  # one row per item, one column per role
    subjects: Mapping[str, np.ndarray]  # subject -> its items; an item may count for several
    sha256: str
    overall: str | None = None  # the subject that holds every item


def read_items(recipe: Recipe, entry: EvaluatorSettings, columns: Mapping[str, str], setting: str) -> Items:
    """Read one evaluation's rows. `columns` maps the evaluator's roles to columns or SQL expressions.

    Raises RecipeError for a bad source, condition or expression, and when no row is left.
    """
    query = Query(read_rows(entry.source or recipe.forget.source, f"{setting}.source"))
    rows = query.where(entry.where, f"{setting}.where")
    # Two evaluations of the same rows draw the same ones, so that one may judge what the other generated.
    rows = draw(rows, entry.limit, seed_for(0, "items"))
    refuse_files_without(query, columns, rows, setting)
    items = taken(query.project(columns, f"{setting}."), rows)
    for role, given in columns.items():
        _refuse_gaps(query, items[role], role, given, rows, setting)
    roles = next((each for each in SAMPLES if each <= set(columns)), None)
    if roles:
        named = partial(query.records.row_names, rows)
        rendering, tools = rendering_of(recipe, recipe.forget), tools_of(query.records, rows)
        told, beside = items.select(sorted(roles)), items.drop_columns(sorted(roles))
        items = sample_table(told, rendering, setting, query.records.numbers(rows), named, tools)
        for role in beside.column_names:
            items = items.append_column(role, beside[role])
    else:
        items = items.append_column(ROW, pa.array(query.records.numbers(rows), pa.int64()))
    by: str | AttributeSettings | None = entry.by
    if by is None and recipe.split is not None and attribute_of(recipe.split.by).fits(query):
        by = recipe.split.by
    subjects: dict[str, list[int]] = {}
    if by is not None:
        for item, names in enumerate(subjects_of(query, rows, by, recipe.split, columns, f"{setting}.by")):
            for name in names:
                subjects.setdefault(name, []).append(item)
    overall = entry.subject or (None if subjects else EVERYTHING)
    if overall is not None:
        subjects[overall] = list(range(len(rows)))
    arrays = {name: np.array(members) for name, members in subjects.items()}
    return Items(evaluation_name(entry), entry, items, arrays, table_sha256(items), overall)


def _refuse_gaps(query: Query, column: pa.ChunkedArray, role: str, given: str, rows: np.ndarray, setting: str) -> None:
    """Raises RecipeError, with the first row, for a null, for an empty text, for a list with a null inside, and for a text that
    is none."""
    if role in TEXTS:
        refuse_other_types(column.type, given, f"{setting}.{role}", nested=True)
    # An expression may give an empty prompt on purpose.
    filled = role in SCORED or query.column(given) is not None
    without = {
        "is empty": blank(column) if filled and not pa.types.is_list(column.type) else np.asarray(column.is_null()),
        "has an empty entry": _with_null_inside(column),
    }
    for what, gaps in without.items():
        if gaps.any():
            first = query.records.row_name(int(rows[gaps][0]))
            raise RecipeError(
                f"{setting}.{role}: {given!r} {what} in {gaps.sum()} of {len(rows)} rows (first: {first}); mend them or leave them "
                "out by a where"
            )


def _with_null_inside(column: pa.ChunkedArray) -> np.ndarray:  # (n,) of bool
    """Which rows are lists that hold a null."""
    gaps = np.zeros(len(column), dtype=bool)
    if pa.types.is_list(column.type):
        flat = column.combine_chunks()
        gaps[flat.value_parent_indices().filter(flat.flatten().is_null()).to_numpy()] = True
    return gaps


def refuse_shared_subjects(evaluations: list[Items]) -> None:
    """Two evaluations of one kind must not report under one name. Raises RecipeError."""
    seen: dict[tuple[str, str], str] = {}
    for items in evaluations:
        for subject in items.subjects:
            other = seen.setdefault((items.settings.kind, subject), items.name)
            if other != items.name:
                raise RecipeError(
                    f"evaluate.subject: {other!r} and {items.name!r} both report {items.settings.kind} on {subject!r}; "
                    "give one of them a subject of its own"
                )
