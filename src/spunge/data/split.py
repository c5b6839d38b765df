"""Split the forget rows by an attribute into parts, and say what was dropped and why (SPUNGE, arXiv 2406.11780, step 1)."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from spunge.data.query import ROW, Query
from spunge.data.rows import read_rows, require_columns, text_columns
from spunge.data.samples import Rendering, Samples, sample_table
from spunge.errors import RecipeError, suggestion
from spunge.recipe.schema import Recipe, Rows, Scalar, Split

WHOLE = "all"
UNASSIGNED = "unassigned"


@dataclass(frozen=True)
class Part:
    """The rows with one value of the attribute."""

    value: str
    slug: str  # names its folder
    rows: int  # that have the value
    samples: Samples  # that were selected of them


@dataclass(frozen=True)
class Parts:
    attribute: str | None
    parts: tuple[Part, ...]
    total: int  # rows in the source
    filtered: int  # rows that `where` left out
    unassigned: int  # rows of no part
    dropped: Mapping[str, str]  # value -> why it is no part

    def to_json(self) -> dict[str, Any]:
        return {
            "attribute": self.attribute,
            "parts": [
                {
                    "value": part.value,
                    "slug": part.slug,
                    "rows": part.rows,
                    "selected": len(part.samples),
                    "sha256": part.samples.sha256,
                }
                for part in self.parts
            ],
            "rows": self.total,
            "filtered": self.filtered,
            "unassigned": self.unassigned,
            "dropped": dict(self.dropped),
        }


def split_rows(recipe: Recipe) -> Parts:
    """Read the forget rows and split them. Raises RecipeError for a bad source, expression or value."""
    table = read_rows(recipe.forget.source, "forget.source")
    query = Query(table)
    kept = query.where(recipe.forget.where, "forget.where")
    columns = recipe.forget.columns | ({"refusal": recipe.forget.refusal} if recipe.forget.refusal else {})
    require_columns(table, columns, "forget")
    texts = table.select(list(dict.fromkeys(columns.values())))  # so that taking a part's rows copies no others
    members, unassigned, dropped = _members(query, kept, recipe.split)
    if not members:
        reasons = "; ".join(f"{value!r}: {why}" for value, why in dropped.items()) or "no row has a value"
        raise RecipeError(f"split: no part is left ({reasons})")
    names = slugs(list(members))
    parts = []
    for value, rows in members.items():
        chosen = draw(rows, recipe.forget.limit, seed_for(recipe.seed, "select", value))
        samples = read_samples(texts, columns, rendering_of(recipe, recipe.forget), "forget", chosen)
        parts.append(Part(value, names[value], len(rows), samples))
    by = recipe.split.by if recipe.split else None
    return Parts(by, tuple(parts), table.num_rows, table.num_rows - len(kept), unassigned, dropped)


def random_parts(parts: Sequence[Part], seed: int) -> tuple[Part, ...]:
    """The parts' samples dealt out anew at random, into as many parts of the same sizes: the control of the split.

    A row that is in several parts is dealt out as often.
    """
    everything = pa.concat_tables([part.samples.table for part in parts], promote_options="permissive")
    order = np.random.default_rng(seed_for(seed, "random split")).permutation(everything.num_rows)
    stops = np.cumsum([len(part.samples) for part in parts])
    dealt = np.split(order, stops[:-1])
    return tuple(
        Part(
            f"random {number}", f"random-{number}", len(rows), Samples(everything.take(pa.array(rows)).combine_chunks())
        )
        for number, rows in enumerate(map(np.sort, dealt), start=1)
    )


def select_rows(rows: Rows, recipe: Recipe, setting: str) -> Samples:
    """The samples of a block such as `retain`; what it does not name (source, columns) is forget's."""
    table = read_rows(rows.source or recipe.forget.source, f"{setting}.source")
    kept = Query(table).where(rows.where, f"{setting}.where")
    chosen = draw(kept, rows.limit, seed_for(recipe.seed, "select", setting))
    columns = rows.columns or recipe.forget.columns
    return read_samples(table, columns, rendering_of(recipe, rows), setting, chosen)


def read_samples(
    table: pa.Table, columns: Mapping[str, str], rendering: Rendering, setting: str, rows: np.ndarray
) -> Samples:
    """The samples of the given rows of a table."""
    named = text_columns(table.take(pa.array(rows)), columns, setting)
    return Samples(sample_table(named, rendering, setting, rows.tolist()).combine_chunks())


def rendering_of(recipe: Recipe, rows: Rows) -> Rendering:
    """How a block's rows become texts; what it does not say is forget's, or the default."""
    known: dict[str, Any] = {"variables": recipe.model.template}
    for block in (recipe.forget, rows):
        given = {"chat": block.chat, "learn": block.learn, "end": block.answer_end}
        known |= {key: value for key, value in given.items() if value is not None}
    return Rendering(**known)


def _members(query: Query, kept: np.ndarray, split: Split | None) -> tuple[dict[str, np.ndarray], int, dict[str, str]]:
    """Part -> its row numbers; how many rows are in none; and which values are no part, and why."""
    if split is None:
        return {WHOLE: kept}, 0, {}
    lines = query.values(split.by, "split.by")
    rows, values = lines[ROW].to_numpy(), lines["value"].combine_chunks().dictionary_encode()
    inside = np.isin(rows, kept)
    codes = np.where(
        values.indices.is_null().to_numpy(zero_copy_only=False), -1, values.indices.fill_null(0).to_numpy()
    )
    rows, codes = rows[inside], codes[inside]
    known = {value: code for code, value in enumerate(values.dictionary.to_pylist())}
    counts = np.bincount(codes[codes >= 0], minlength=len(known))
    present = {value for value, code in known.items() if counts[code]}
    wanted = wanted_values(split.values) if split.values is not None else {value: [value] for value in sorted(present)}
    members: dict[str, np.ndarray] = {}
    dropped: dict[str, str] = {}
    assigned = np.zeros(len(rows), dtype=bool)
    for name, spellings in wanted.items():
        found = np.isin(codes, [known[value] for value in spellings if value in present])
        if not found.any():
            raise RecipeError(
                f"split.values: no row has {' or '.join(map(repr, spellings))} as {split.by}{suggestion(spellings[0], present)}"
            )
        assigned |= found
        chosen = np.unique(rows[found])
        if len(chosen) < split.min_rows:
            dropped[name] = f"{len(chosen)} rows, fewer than split.min_rows ({split.min_rows})"
        else:
            members[name] = chosen
    for value in sorted(present - {spelling for spellings in wanted.values() for spelling in spellings}):
        dropped[value] = f"{counts[known[value]]} rows, not in split.values"
    nowhere = np.setdiff1d(kept, rows[assigned])
    return _with_unassigned(members, nowhere, split, dropped)


def _with_unassigned(
    members: dict[str, np.ndarray], nowhere: np.ndarray, split: Split, dropped: dict[str, str]
) -> tuple[dict[str, np.ndarray], int, dict[str, str]]:
    if len(nowhere) and split.unassigned == "error":
        raise RecipeError(
            f"split.unassigned: {len(nowhere)} rows are in no part (first: row {int(nowhere[0])}); "
            "add their values to split.values, or set split.unassigned to drop or keep"
        )
    if len(nowhere) and split.unassigned == "keep":
        if UNASSIGNED in members:
            raise RecipeError(f"split.unassigned: a part is called {UNASSIGNED!r} already; rename it in split.values")
        return {**members, UNASSIGNED: nowhere}, 0, dropped
    return members, len(nowhere), dropped


def wanted_values(values: Sequence[Scalar] | Mapping[str, Sequence[Scalar]]) -> dict[str, list[str]]:
    """Part -> the spellings that belong to it, as text."""
    if isinstance(values, Mapping):
        return {str(name): [as_text(value) for value in spellings] for name, spellings in values.items()}
    return {as_text(value): [as_text(value)] for value in values}


def as_text(value: Scalar) -> str:
    """A value as DuckDB casts it to text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def subjects_of(query: Query, rows: np.ndarray, by: str, split: Split | None, setting: str) -> list[list[str]]:
    """The subjects of each row: its values of `by`, with the split's spellings under their part's name."""
    lines = query.values(by, setting)
    part_of: dict[str, str] = {}
    if split is not None and split.by == by and split.values is not None:
        part_of = {spelling: name for name, spellings in wanted_values(split.values).items() for spelling in spellings}
    found: dict[int, list[str]] = {int(row): [] for row in rows}
    for row, value in zip(lines[ROW].to_pylist(), lines["value"].to_pylist(), strict=True):
        if row in found and value is not None:
            subject = part_of.get(value, value)
            if subject not in found[row]:
                found[row].append(subject)
    return [found[int(row)] for row in rows]


def draw(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most `limit` of the rows, at random, in their own order."""
    if limit is None or len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


def seed_for(seed: int, *names: str) -> int:
    """A seed of its own for each name, whatever the others are: 63 bits of sha256."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def slugs(values: Sequence[str]) -> dict[str, str]:
    """Value -> a folder name of its own: [a-z0-9-], at most 48 characters, unequal even where case is ignored.

    A value that survives as it is (but for case and spaces) keeps its plain name; any other gets part of its sha256.
    """
    plain = {value: _plain(value) for value in values}
    shared = {slug for slug in plain.values() if list(plain.values()).count(slug) > 1}
    result = {}
    for value, slug in plain.items():
        faithful = re.fullmatch(r"[a-z0-9]+([ _-][a-z0-9]+)*", value.lower()) and len(value) <= 40
        unique = hashlib.sha256(value.encode()).hexdigest()[:8]
        result[value] = slug if faithful and slug not in shared else f"{slug}-{unique}".lstrip("-")
    return result


def _plain(value: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:39].rstrip("-")
