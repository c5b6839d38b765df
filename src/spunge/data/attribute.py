"""The attribute's values: which rows have which, how a recipe may spell them, and which of them look like slips."""

import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import yaml

from spunge.data.arrays import among, blocks, chosen, joined, mark, zeros
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
    """One line for each row and value of it, of the asked rows and others."""

    rows: Sequence[np.ndarray]  # piece by piece: their numbers, ascending
    codes: np.ndarray  # (lines,): which of the values; -1 where there is none, or the row was not asked for
    counts: dict[str, int]  # value -> lines
    code_of: dict[Hashable, int]  # what all spellings of a value have in common -> which value it is
    kind: Kind


def members_of(unlabelled: Unlabelled, split: Split) -> Members:
    """The asked rows by the attribute's values. Raises RecipeError for an attribute that is wrong and a value of no row."""
    attribute, query, kept = attribute_of(split.by), unlabelled.query, unlabelled.rows
    told = attribute.values(unlabelled)
    valued = _valued(told, kept, query.rows)
    values = sorted(valued.counts)
    wanted = wanted_values(split.values) if split.values is not None else {value: [value] for value in values}
    part_of: dict[int, str] = {}
    codes_of: dict[str, list[int]] = {}
    for name, spellings in wanted.items():
        keys = [spelling(word, valued.kind) for word in spellings]
        codes = [valued.code_of[key] for key in keys if key in valued.code_of]
        if not codes:
            named, title = " or ".join(map(repr, spellings)), attribute.title(query)
            raise RecipeError(f"split.values: no row has {named} as {title}{suggestion(spellings[0], values)}")
        if isinstance(split.values, list) and codes[0] in part_of:
            raise RecipeError(f"split.values: {part_of[codes[0]]!r} and {name!r} are one value; leave one of them out")
        part_of |= dict.fromkeys(codes, name)
        codes_of[name] = codes
    members = _rows_of(valued, codes_of)
    parts = {value: part_of.get(valued.code_of[spelling(value, valued.kind)]) for value in values}
    dropped = {value: f"{valued.counts[value]} rows, not in split.values" for value in values if parts[value] is None}
    assigned = zeros(query.rows, bool)
    for rows in members.values():
        mark(assigned, rows)
    notes = [*told.notes, *look_alikes(valued.counts, parts)]
    return Members(members, chosen(kept, assigned, False), dropped, notes)


def _valued(valued: Valued, kept: np.ndarray, count: int) -> _Valued:
    """count: of all rows."""
    lines, kind = valued.lines, valued.kind
    asked = zeros(count, bool)
    mark(asked, kept)
    code_of_name: dict[str, int] = {}
    pieces = lines.select([ROW, "value"]).to_batches()

    def coded() -> Iterator[np.ndarray]:
        for piece in pieces:
            values = piece["value"].dictionary_encode()
            names = [code_of_name.setdefault(name, len(code_of_name)) for name in values.dictionary.to_pylist()]
            here = values.indices.fill_null(len(names)).to_numpy()
            yield np.where(asked[piece[ROW].to_numpy()], np.array([*names, -1], np.int32)[here], -1)

    codes = joined(coded(), np.int32)
    counts = np.zeros(len(code_of_name) + 1, np.int64)  # of lines without a value first
    for part in blocks(len(codes)):
        counts += np.bincount(codes[part] + 1, minlength=len(counts))
    present = {name: code for name, code in code_of_name.items() if counts[code + 1]}
    return _Valued(
        [piece[ROW].to_numpy() for piece in pieces],
        codes,
        {name: int(counts[code + 1]) for name, code in present.items()},
        {spelling(name, kind): code for name, code in present.items()},
        kind,
    )


def _rows_of(valued: _Valued, codes_of: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Part -> the rows that have one of its values, ascending, each once. All of them lie in one array, in pieces of as many as
    there are lines of the part."""
    counts = {valued.code_of[spelling(value, valued.kind)]: count for value, count in valued.counts.items()}
    room = np.cumsum([0, *(sum(counts[code] for code in {*codes}) for codes in codes_of.values())])
    rows, ends = zeros(int(room[-1]), np.int64), room[:-1].copy()
    # A value may be in several parts: row k of the table holds the k-th of each value.
    parts_of: dict[int, list[int]] = {}
    for part, codes in enumerate(codes_of.values()):
        for code in {*codes}:
            parts_of.setdefault(code, []).append(part)
    layers = np.full((max(map(len, parts_of.values()), default=0), max(parts_of, default=-1) + 2), -1)
    for code, parts in parts_of.items():
        layers[: len(parts), code] = parts
    before = 0
    for piece in valued.rows:
        here = valued.codes[before : before + len(piece)]
        before += len(piece)
        # The last column is of no value: -1, and those behind all that are in parts.
        inside = layers[:, np.where(here < layers.shape[1] - 1, here, -1)].ravel()
        own = np.tile(piece, len(layers))
        order = np.lexsort((own, inside))
        order = order[np.searchsorted(inside[order], 0) :]
        cuts = np.flatnonzero(np.diff(inside[order])) + 1
        for some in np.split(order, cuts) if len(order) else ():
            _append(rows, room, ends, int(inside[some[0]]), own[some])
    return {name: rows[start:end] for name, start, end in zip(codes_of, room[:-1].tolist(), ends.tolist(), strict=True)}


def _append(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, part: int, own: np.ndarray) -> None:
    """Put numbers that ascend behind those of a part, each once."""
    once = own[np.diff(own, prepend=-1) > 0]
    if ends[part] > starts[part] and once[0] == rows[ends[part] - 1]:
        once = once[1:]
    rows[ends[part] : ends[part] + len(once)] = once
    ends[part] += len(once)


def subjects_of(
    valued: Valued, query: Query, rows: np.ndarray, by: str | AttributeSettings, split: Split | None
) -> list[list[str]]:
    """The subjects of each of some rows, ascending: its values of `by`, with the split's spellings under their part's name."""
    part_of: dict[Hashable, str] = {}
    if split is not None and split.values is not None and same_attribute(query, split.by, by):
        part_of = {
            spelling(word, valued.kind): name for name, words in wanted_values(split.values).items() for word in words
        }
    subjects: dict[int, list[str]] = {int(row): [] for row in rows}
    for piece in valued.lines.select([ROW, "value"]).to_batches():
        asked = pa.table(piece).filter(pa.array(among(piece[ROW].to_numpy(), rows)))
        for row, value in zip(asked[ROW].to_pylist(), asked["value"].to_pylist(), strict=True):
            subject = part_of.get(spelling(value, valued.kind), value) if value is not None else None
            if subject is not None and subject not in subjects[row]:
                subjects[row].append(subject)
    return [subjects[int(row)] for row in rows]


def same_attribute(query: Query, one: str | AttributeSettings, other: str | AttributeSettings) -> bool:
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
