"""The attribute's values: which rows have which, how a recipe may spell them, and which of them look like slips."""

import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import numpy as np
import yaml

from spunge.data.attribution import SQL, Valued, attribute_of
from spunge.data.query import ROW, Kind, Query
from spunge.data.unlabelled import Unlabelled
from spunge.errors import RecipeError, suggestion
from spunge.recipe.rows import Scalar
from spunge.recipe.spelling import read_foreign_yaml
from spunge.recipe.split import AttributeSettings, Split

REMARKS = 10  # at most, on values that look alike


class Members(NamedTuple):
    """Which rows are in which part, before parts are dropped for having too few."""

    members: dict[str, np.ndarray]  # part -> its row numbers, ascending
    nowhere: np.ndarray  # rows of no part
    dropped: dict[str, str]  # value -> why it is no part
    notes: list[str]


class _Valued(NamedTuple):
    """One line for each row and value of it."""

    rows: np.ndarray  # (n,)
    codes: np.ndarray  # (n,): which of the values; -1 where there is none
    counts: dict[str, int]  # value -> lines
    code_of: dict[Hashable, int]  # what all spellings of a value have in common -> which value it is
    kind: Kind


def members_of(unlabelled: Unlabelled, split: Split) -> Members:
    """The asked rows by the attribute's values. Raises RecipeError for an attribute that is wrong and a value of no row."""
    attribute, query, kept = attribute_of(split.by), unlabelled.query, unlabelled.rows
    told = attribute.values(unlabelled)
    valued = _valued(told, kept)
    values = sorted(valued.counts)
    wanted = wanted_values(split.values) if split.values is not None else {value: [value] for value in values}
    part_of: dict[int, str] = {}
    members: dict[str, np.ndarray] = {}
    for name, spellings in wanted.items():
        keys = [spelling(word, valued.kind) for word in spellings]
        codes = [valued.code_of[key] for key in keys if key in valued.code_of]
        if not codes:
            named, title = " or ".join(map(repr, spellings)), attribute.title(query)
            raise RecipeError(f"split.values: no row has {named} as {title}{suggestion(spellings[0], values)}")
        if isinstance(split.values, list) and codes[0] in part_of:
            raise RecipeError(f"split.values: {part_of[codes[0]]!r} and {name!r} are one value; leave one of them out")
        part_of |= dict.fromkeys(codes, name)
        members[name] = np.unique(valued.rows[np.isin(valued.codes, codes)])
    parts = {value: part_of.get(valued.code_of[spelling(value, valued.kind)]) for value in values}
    dropped = {value: f"{valued.counts[value]} rows, not in split.values" for value in values if parts[value] is None}
    assigned = valued.rows[np.isin(valued.codes, list(part_of))]
    notes = [*told.notes, *look_alikes(valued.counts, parts)]
    return Members(members, np.setdiff1d(kept, assigned), dropped, notes)


def _valued(valued: Valued, kept: np.ndarray) -> _Valued:
    lines, kind = valued.lines, valued.kind
    rows, values = lines[ROW].to_numpy(), lines["value"].combine_chunks().dictionary_encode()
    inside = np.isin(rows, kept)
    missing = values.indices.is_null().to_numpy(zero_copy_only=False)
    codes = np.where(missing, -1, values.indices.fill_null(0).to_numpy())[inside]
    names: list[str] = values.dictionary.to_pylist()
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    present = {name: code for code, name in enumerate(names) if counts[code]}
    return _Valued(
        rows[inside],
        codes,
        {name: int(counts[code]) for name, code in present.items()},
        {spelling(name, kind): code for name, code in present.items()},
        kind,
    )


def subjects_of(unlabelled: Unlabelled, by: str | AttributeSettings, split: Split | None) -> list[list[str]]:
    """The subjects of each asked row: its values of `by`, with the split's spellings under their part's name."""
    query, rows = unlabelled.query, unlabelled.rows
    lines, kind, _ = attribute_of(by).values(unlabelled)
    part_of: dict[Hashable, str] = {}
    if split is not None and split.values is not None and _same(query, split.by, by):
        part_of = {spelling(word, kind): name for name, words in wanted_values(split.values).items() for word in words}
    subjects: dict[int, list[str]] = {int(row): [] for row in rows}
    for row, value in zip(lines[ROW].to_pylist(), lines["value"].to_pylist(), strict=True):
        if row in subjects and value is not None:
            subject = part_of.get(spelling(value, kind), value)
            if subject not in subjects[row]:
                subjects[row].append(subject)
    return [subjects[int(row)] for row in rows]


def _same(query: Query, one: str | AttributeSettings, other: str | AttributeSettings) -> bool:
    """Whether two settings mean one attribute; a column has several spellings."""
    first, second = attribute_of(one), attribute_of(other)
    return first == second or (first.source is second.source is SQL and first.title(query) == second.title(query))


def wanted_values(values: Sequence[Scalar] | Mapping[str, Sequence[Scalar]]) -> dict[str, list[str]]:
    """Part -> the spellings that belong to it, as text."""
    if isinstance(values, Mapping):
        return {str(name): [as_text(value) for value in spellings] for name, spellings in values.items()}
    return {as_text(value): [as_text(value)] for value in values}


def as_text(value: Scalar) -> str:
    """A value as DuckDB casts it to text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def spelling(word: str, kind: Kind) -> Hashable:
    """What all spellings of one value have in common: of a number, the number (4, 4.0, 4e0, 0x4); of a truth value, which it is
    (true, True, yes); of a text, the text."""
    if kind == "text":
        return word
    if kind == "number":
        with suppress(InvalidOperation):
            number = Decimal(word.replace("_", ""))
            return word if number.is_nan() else number
    with suppress(yaml.YAMLError):
        read = next(iter(read_foreign_yaml(word)), None)
        if kind == "truth" and isinstance(read, bool):
            return read
        if kind == "number" and type(read) is int:
            return Decimal(read)
    return word


def look_alikes(counts: Mapping[str, int], parts: Mapping[str, str | None]) -> list[str]:
    """Remarks on values that differ by spaces, case or Unicode form alone and are not in one part.

    parts: value -> its part, or None.
    """
    groups: dict[str, list[str]] = {}
    for value in counts:
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", value).split()).casefold(), []).append(value)
    remarks = []
    for group in groups.values():
        if len(group) > 1 and len({parts[value] for value in group}) > 1:
            # Two forms of one letter look the same; as escapes they do not.
            shown = repr if len({unicodedata.normalize("NFC", value) for value in group}) == len(group) else ascii
            named = " and ".join(
                f"{shown(value)} ({counts[value]} rows)" for value in sorted(group, key=lambda v: -counts[v])
            )
            remarks.append(
                f"split: {named} differ by spaces, case or Unicode form alone; one part: split.values: {{NAME: [..]}}"
            )
    return remarks[:REMARKS] + ([f"split: {len(remarks) - REMARKS} more such values"] if len(remarks) > REMARKS else [])
