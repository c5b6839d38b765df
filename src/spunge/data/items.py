"""The rows that an evaluation measures, and the subjects that each of them counts for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.data.samples import sample_table, table_sha256
from spunge.data.split import draw, rendering_of, seed_for, subjects_of
from spunge.errors import RecipeError
from spunge.recipe.schema import EvaluatorSettings, Recipe, evaluation_name

EVERYTHING = "all"
SAMPLES = ({"prompt", "completion"}, {"messages"})


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
    table = read_rows(entry.source or recipe.forget.source, f"{setting}.source")
    query = Query(table)
    rows = query.where(entry.where, f"{setting}.where")
    # Two evaluations of the same rows draw the same ones, so that one may judge what the other generated.
    rows = draw(rows, entry.limit, seed_for(0, "items"))
    items = query.project(columns, rows, setting)
    for role in items.column_names:
        if items[role].null_count:
            raise RecipeError(
                f"{setting}.{role}: {columns[role]!r} is null in {items[role].null_count} rows; filter them out"
            )
    if set(columns) in SAMPLES:  # texts to be scored as they would be learned
        items = sample_table(items, rendering_of(recipe, recipe.forget), setting, rows.tolist())
    by = entry.by
    if by is None and recipe.split is not None and query.has(recipe.split.by):
        by = recipe.split.by
    subjects: dict[str, list[int]] = {}
    if by is not None:
        for item, names in enumerate(subjects_of(query, rows, by, recipe.split, f"{setting}.by")):
            for name in names:
                subjects.setdefault(name, []).append(item)
    overall = entry.subject or (None if subjects else EVERYTHING)
    if overall is not None:
        subjects[overall] = list(range(len(rows)))
    arrays = {name: np.array(members) for name, members in subjects.items()}
    return Items(evaluation_name(entry), entry, items, arrays, table_sha256(items), overall)


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
