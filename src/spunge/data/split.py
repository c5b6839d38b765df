"""Split the forget rows by an attribute into parts, and say what was dropped and why (SPUNGE, arXiv 2406.11780, step 1)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from spunge.data.arrays import chosen, count_of, dealt, mark, numbers_of, picked, shuffled, zeros
from spunge.data.attribute import Members, members_of
from spunge.data.attribution import attribute_of
from spunge.data.keeping import AT_ONCE, taken_apart, together
from spunge.data.media import media_column
from spunge.data.naming import slugs
from spunge.data.query import Query
from spunge.data.rows import Records, read_rows
from spunge.data.samples import Rendering, Samples, sample_table
from spunge.data.tables import taken
from spunge.data.texts import blank_rows, left_out, refuse_files_without, text_table, unspaced
from spunge.data.unlabelled import Unlabelled
from spunge.errors import RecipeError
from spunge.recipe.rows import Rows, Source
from spunge.recipe.schema import Recipe
from spunge.recipe.split import Split

WHOLE = "all"
UNASSIGNED = "unassigned"
MANY, SHARE = 1 << 23, 50  # of more rows than these, more than a fiftieth are drawn by a shuffle that may lie in a file


@dataclass(frozen=True)
class Part:
    """The rows with one value of the attribute."""

    value: str
    slug: str  # names its folder
    rows: int  # that have the value
    samples: Samples  # that were selected of them
    empty: int = 0  # rows that were left out because a text of theirs is empty
    # Places in the source of its rows; None: of a part that no value makes.
    members: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Parts:
    attribute: str | None
    parts: tuple[Part, ...]
    total: int  # rows in the source
    filtered: int  # rows that `where` left out
    unassigned: int  # rows of no part
    dropped: Mapping[str, str]  # value -> why it is no part
    rows: np.ndarray  # places in the source of all rows of parts, also of those that a limit leaves out
    notes: tuple[str, ...] = ()  # what a person should look at
    media: str | None = None  # a column of the source that holds pictures, sound or films

    @property
    def values(self) -> set[str]:
        """The attribute's values that are parts. Without a split the one part holds every row, and is no value of an attribute."""
        return {part.value for part in self.parts} if self.attribute is not None else set()

    def to_json(self) -> dict[str, Any]:
        return {
            "attribute": self.attribute,
            "parts": [
                {
                    "value": part.value,
                    "slug": part.slug,
                    "rows": part.rows,
                    "empty": part.empty,
                    "selected": len(part.samples),
                    "sha256": part.samples.sha256,
                }
                for part in self.parts
            ],
            "rows": self.total,
            "filtered": self.filtered,
            "unassigned": self.unassigned,
            "dropped": dict(self.dropped),
            "notes": list(self.notes),
        }


def split_rows(recipe: Recipe) -> Parts:
    """Read the forget rows and split them. Rows with an empty text are left out and counted.

    Raises RecipeError for a bad source, column, expression or value, and for a part without any text.
    """
    forget = recipe.forget
    if forget is None:
        return Parts(None, (), 0, 0, 0, {}, np.array([], dtype=int))
    query = Query(read_rows(forget.source, "forget.source"))
    kept = query.where(forget.where, "forget.where")
    columns = forget.columns | ({"refusal": forget.refusal} if forget.refusal else {})
    texts = text_table(query, columns, "forget")
    refuse_files_without(query, columns, kept, "forget")
    empty = blank_rows(texts)
    split = recipe.split
    unlabelled = Unlabelled(query, kept, columns, recipe.model, "split.by")
    known = members_of(unlabelled, split) if split else Members({WHOLE: kept}, kept[:0], {}, [])
    dropped, notes = dict(known.dropped), list(known.notes)
    if not rendering_of(recipe, forget).chat:
        notes += unspaced(texts, chosen(kept, empty, False), "forget")
    members = _with_enough_text(known.members, empty, split.min_rows if split else 1, dropped, query)
    unassigned = _kept_unassigned(known.nowhere, members, split, query)
    members |= _with_enough_text(unassigned, empty, 1, dropped, query)
    if not members:
        reasons = "; ".join(f"{value!r}: {why}" for value, why in dropped.items()) or "no row has a value"
        raise RecipeError(f"split: no part is left ({reasons})")
    names, rendering = slugs(list(members)), rendering_of(recipe, forget)
    parts = []
    for value, rows in members.items():
        filled = chosen(rows, empty, False)
        drawn = draw(filled, forget.limit, seed_for(recipe.seed, "select", value))
        notes += left_out(query, empty, columns, rows, f"part {value!r}")
        samples = read_samples(texts, rendering, "forget", query.records, drawn)
        parts.append(Part(value, names[value], len(rows), samples, len(rows) - len(filled), rows))
    by = attribute_of(split.by).title(query) if split else None
    lost = 0 if unassigned else len(known.nowhere)
    inside = zeros(query.rows, bool)
    for rows in members.values():
        mark(inside, rows)
    media, left = media_column(query.records.table), query.rows - len(kept)
    return Parts(by, tuple(parts), query.rows, left, lost, dropped, numbers_of(inside), tuple(notes), media)


def read_samples(texts: pa.Table, rendering: Rendering, setting: str, records: Records, rows: np.ndarray) -> Samples:
    """The samples of the given rows of a table of texts, made some thousands at a time: the memory may not hold all of them."""

    def made(some: np.ndarray) -> pa.Table:
        names, tools = partial(records.row_names, some), tools_of(records, some)
        return sample_table(taken(texts, some), rendering, setting, records.numbers(some), names, tools)

    return Samples(together(made(rows[start : start + AT_ONCE]) for start in range(0, max(1, len(rows)), AT_ONCE)))


def tools_of(records: Records, rows: np.ndarray) -> pa.ChunkedArray | None:
    """The column `tools` of the given rows, if there is one: conversations that call functions carry their descriptions in it."""
    return taken(records.table.select(["tools"]), rows)["tools"] if "tools" in records.table.column_names else None


def sources_of(sources: Sequence[Source] | None, recipe: Recipe, setting: str) -> Sequence[Source]:
    """Where rows come from: a block's own sources, or forget's. Raises RecipeError where there are neither."""
    if sources is not None:
        return sources
    if recipe.forget is None:
        raise RecipeError(f"{setting}: missing; the recipe has no rows to forget, whose source would be taken")
    return recipe.forget.source


def rendering_of(recipe: Recipe, rows: Rows | None) -> Rendering:
    """How a block's rows become texts; what it does not say is forget's, or the default."""
    known: dict[str, Any] = {"variables": recipe.model.template}
    for block in filter(None, (recipe.forget, rows)):
        given = {"chat": block.chat, "learn": block.learn, "end": block.answer_end}
        known |= {key: value for key, value in given.items() if value is not None}
    return Rendering(**known)


def _with_enough_text(
    members: Mapping[str, np.ndarray], empty: np.ndarray, min_rows: int, dropped: dict[str, str], query: Query
) -> dict[str, np.ndarray]:
    """The parts that have at least `min_rows` rows with text; others join the dropped. Raises RecipeError for one with none."""
    enough: dict[str, np.ndarray] = {}
    for value, rows in members.items():
        filled = len(rows) - count_of(rows, empty)
        if len(rows) >= min_rows and not filled:
            raise RecipeError(
                f"forget: part {value!r} has no text: all of its {len(rows)} rows are empty (first: "
                f"{query.records.row_name(int(rows[0]))}); leave the part out by forget.where or split.values"
            )
        if filled < min_rows:
            with_text = " with text" if filled < len(rows) else ""
            dropped[value] = f"{filled} rows{with_text}, fewer than split.min_rows ({min_rows})"
        else:
            enough[value] = rows
    return enough


def _kept_unassigned(
    nowhere: np.ndarray, members: Mapping[str, np.ndarray], split: Split | None, query: Query
) -> dict[str, np.ndarray]:
    """The part of the rows that are in no other, where the recipe keeps them as one."""
    if split is None or not len(nowhere) or split.unassigned == "drop":
        return {}
    if split.unassigned == "error":
        raise RecipeError(
            f"split.unassigned: {len(nowhere)} rows are in no part (first: {query.records.row_name(int(nowhere[0]))}); "
            "add their values to split.values, or set split.unassigned to drop or keep"
        )
    if UNASSIGNED in members:
        raise RecipeError(f"split.unassigned: a part is called {UNASSIGNED!r} already; rename it in split.values")
    return {UNASSIGNED: nowhere}


def random_parts(parts: Sequence[Part], seed: int) -> tuple[Part, ...]:
    """The parts' samples dealt out anew at random, into as many parts of the same sizes: the control of the split.

    A row that is in several parts is dealt out as often.
    """
    everything = pa.concat_tables([part.samples.table for part in parts], promote_options="permissive")
    stops = np.cumsum([len(part.samples) for part in parts])
    members = dealt(everything.num_rows, stops[:-1], np.random.default_rng(seed_for(seed, "random split")))
    return tuple(
        Part(f"random {number}", f"random-{number}", len(rows), Samples(taken_apart(everything, rows)))
        for number, rows in enumerate(members, start=1)
    )


def draw(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most `limit` of the rows, at random, in their own order."""
    if limit is None or len(rows) <= limit:
        return rows
    generator = np.random.default_rng(seed)
    if len(rows) <= MANY or limit <= len(rows) // SHARE:
        return np.sort(generator.choice(rows, limit, replace=False))
    drawn = zeros(len(rows), bool)
    mark(drawn, shuffled(len(rows), generator)[-limit:])
    return picked(rows, numbers_of(drawn))


def seed_for(seed: int, *names: str) -> int:
    """A seed of its own for each name, whatever the others are: 63 bits of sha256."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
