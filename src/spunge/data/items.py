"""The rows that an evaluation measures, and the subjects that each of them counts for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa

from spunge.data.arrays import chosen
from spunge.data.forgotten import forgotten_items
from spunge.data.media import media_column
from spunge.data.query import ROW, Query
from spunge.data.rows import read_rows
from spunge.data.samples import sample_table, table_sha256
from spunge.data.split import Parts, draw, rendering_of, seed_for, sources_of, tools_of
from spunge.data.subjects import Subjects, told_subjects
from spunge.data.tables import taken
from spunge.data.texts import blank, refuse_files_without, refuse_other_types
from spunge.data.unlabelled import Unlabelled
from spunge.errors import RecipeError
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name
from spunge.recipe.rows import Source
from spunge.recipe.schema import Recipe

EVERYTHING = "all"
MEMBER = "member"  # the role that says whether a row is one of those whose knowledge is measured, or to compare with
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
    forgotten: np.ndarray | None = None  # (items,) of bool: are rows to forget; None: nothing tells
    media: str | None = None  # a column of the source that holds pictures, sound or films
    left: int = 0  # rows that count for no subject, and so are not among the items

    @property
    def note(self) -> str | None:
        """What a person should know of the rows that are not measured."""
        if not self.left:
            return None
        one = self.left == 1
        return (
            f"evaluate: {self.name!r}: {self.left} row{'' if one else 's'} in no part {'is' if one else 'are'} left out; give it a "
            "subject to measure all rows"
        )

    def share_forgotten(self, subject: str) -> Literal["all", "some", "none"] | None:
        """How many of a subject's items are rows to forget; None where nothing tells. Non-members do not count."""
        chosen = self.subjects[subject]
        if MEMBER in self.table.column_names:
            chosen = chosen[np.array(self.table[MEMBER].to_pylist(), dtype=bool)[chosen]]
        if self.forgotten is None or not len(chosen):
            return None
        own = self.forgotten[chosen]
        return "all" if own.all() else "some" if own.any() else "none"


def read_items(
    recipe: Recipe,
    entry: EvaluatorSettings,
    columns: Mapping[str, str],
    setting: str,
    others: list[Source] | None = None,
    parts: Parts | None = None,
) -> Items:
    """Read one evaluation's rows. `columns` maps the evaluator's roles to columns or SQL expressions.

    parts: the rows to forget, which tell those among the items. others: the source of rows that are no members, as against the
    evaluation's own. They, or those that the role `member` says are
    none, count for every subject, and name none. Raises RecipeError for a bad source, condition or expression, and when no row
    is left. Rows that would be reported under no subject are left out before any is drawn.
    """
    try:
        return _read_items(recipe, entry, columns, setting, others, parts)
    except RecipeError as error:
        own, forget = dict(entry), dict(recipe.forget or {})
        for role, given in columns.items():
            inherited = role in own and own[role] is None and forget.get(role) == given
            if inherited and str(error).startswith(f"{setting}.{role}:"):
                raise RecipeError(
                    f"{error} (the evaluation names no {role} of its own, so forget.{role} is taken)"
                ) from error
        raise


def _read_items(
    recipe: Recipe,
    entry: EvaluatorSettings,
    columns: Mapping[str, str],
    setting: str,
    others: list[Source] | None,
    parts: Parts | None,
) -> Items:
    query = Query(read_rows(sources_of(entry.source, recipe, f"{setting}.source"), f"{setting}.source"))
    asked = query.where(entry.where, f"{setting}.where")
    told = told_subjects(recipe, entry, Unlabelled(query, asked, columns, recipe.model, f"{setting}.by"), parts)
    kept = asked if entry.subject is not None else _reported(query, asked, columns, told, setting)
    # Two evaluations of the same rows draw the same ones, so that one may judge what the other generated.
    rows = draw(kept, entry.limit, seed_for(0, "items"))
    items = _items(recipe, query, rows, columns, setting)
    named = told.of(rows)
    if others is not None:
        items = _with_others(recipe, entry, items, others, columns, setting)
    members = _members(items, setting)
    subjects: dict[str, list[int]] = {}
    for item, names in enumerate(named):
        for name in names if members[item] else ():
            subjects.setdefault(name, []).append(item)
    overall = entry.subject or (None if subjects else EVERYTHING)
    if overall is not None:
        subjects[overall] = np.flatnonzero(members).tolist()
    outside = np.flatnonzero(~members)
    arrays = {name: np.concatenate([np.array(own, dtype=int), outside]) for name, own in subjects.items()}
    forgotten = None
    if parts is not None and recipe.forget is not None:
        own = entry.source in (None, recipe.forget.source)
        places = np.concatenate([rows, np.full(items.num_rows - len(rows), -1)]) if own else None
        forgotten = forgotten_items(items, places, parts)
    media = media_column(query.records.table)
    left = len(asked) - len(kept)
    return Items(evaluation_name(entry), entry, items, arrays, table_sha256(items), overall, forgotten, media, left)


def _reported(
    query: Query, rows: np.ndarray, columns: Mapping[str, str], told: Subjects, setting: str
) -> np.ndarray:  # (n,)
    """The rows whose measurements are reported: those that count for a subject, and all where none does, as of these a subject is
    made. Non-members, which count for every subject, are among them."""
    counted = chosen(rows, told.counted)
    if not len(counted) or len(counted) == len(rows):
        return rows
    if MEMBER not in columns:
        return counted
    members = taken(query.project({MEMBER: columns[MEMBER]}, f"{setting}."), rows)[MEMBER].to_pylist()
    outside = np.array([member != 1 for member in members], dtype=bool)  # what is neither yes nor no is refused
    return np.asarray(rows[told.counted[rows] | outside])


def _with_others(
    recipe: Recipe,
    entry: EvaluatorSettings,
    items: pa.Table,
    others: list[Source],
    columns: Mapping[str, str],
    setting: str,
) -> pa.Table:
    """The items, and behind them rows of another source that are no members; `member` tells which is which."""
    query = Query(read_rows(others, f"{setting}.non_members"))
    rows = draw(np.arange(query.rows), entry.limit, seed_for(0, "items"))
    both = [items, _items(recipe, query, rows, columns, f"{setting}.non_members")]
    told = [
        table.append_column(MEMBER, pa.array([own] * table.num_rows, pa.bool_()))
        for own, table in zip((True, False), both, strict=True)
    ]
    return pa.concat_tables(told, promote_options="permissive")


def _members(items: pa.Table, setting: str) -> np.ndarray:  # (n,) of bool
    """Which items are members, where the rows tell; all where they do not. Raises RecipeError for what is neither yes nor no."""
    if MEMBER not in items.column_names:
        return np.ones(items.num_rows, dtype=bool)
    values = items[MEMBER].to_pylist()
    for at, value in enumerate(values):
        if value not in (0, 1):  # False and True too
            number = items[ROW][at].as_py()
            raise RecipeError(
                f"{setting}.{MEMBER}: row {number}: {value!r} is neither true nor false; give a condition, such as split = 'train'"
            )
    return np.array(values, dtype=bool)


def _items(recipe: Recipe, query: Query, rows: np.ndarray, columns: Mapping[str, str], setting: str) -> pa.Table:
    """The given rows, one column per role, texts as forget's rows are rendered."""
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
        return items
    return items.append_column(ROW, pa.array(query.records.numbers(rows), pa.int64()))


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
