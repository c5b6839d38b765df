"""Rows whose values of the attribute are asked for, as an attribute source is given them; and labels that are made once."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spunge.data.arrays import blocks, chosen
from spunge.data.chat import Conversation
from spunge.data.keeping import AT_ONCE, together
from spunge.data.query import ROW, Query
from spunge.data.samples import Rendering, sample_table
from spunge.data.tables import taken
from spunge.data.texts import blank_rows, text_table
from spunge.files import cache_folder, fingerprint, read_json, sealed, unsealed, write_text
from spunge.recipe.model import ModelSettings


class Unlabelled(NamedTuple):
    """Rows, and what is known of them."""

    query: Query
    rows: np.ndarray  # (n,) which of the query's rows are asked for, ascending
    texts: Mapping[str, str]  # role -> column or expression of the rows' texts
    model: ModelSettings  # the recipe's
    setting: str  # the recipe's key, for errors


class RowTexts(NamedTuple):
    """What rows say, without those that say nothing."""

    rows: np.ndarray  # (n,)
    texts: list[str]


def lines_of(unlabelled: Unlabelled, values_of: Callable[[list[str]], Iterable[Sequence[str]]]) -> pa.Table:
    """Columns `__row__` and `value`: a line for each asked row and value of it, or one with null where it has none.

    values_of: of each of some thousands of texts, its values. It is called again and again, as the memory may not hold all rows.
    """

    def lines() -> Iterator[pa.Table]:
        after = 0  # of the asked rows, which ascend; those that say nothing are between the others
        for rows, texts in row_texts_apart(unlabelled):
            end = int(np.searchsorted(unlabelled.rows, rows[-1:], side="right").max(initial=after))
            values = dict(zip(rows.tolist(), values_of(texts), strict=True))
            yield _lines({row: values.get(row) or [None] for row in unlabelled.rows[after:end].tolist()})
            after = end
        for part in blocks(len(unlabelled.rows) - after):
            yield _lines({row: [None] for row in unlabelled.rows[after:][part].tolist()})

    return together(lines())


def _lines(values_of: Mapping[int, Sequence[str | None]]) -> pa.Table:
    rows = [row for row, values in values_of.items() for _ in values]
    said = [value for values in values_of.values() for value in values]
    return pa.table({ROW: pa.array(rows, pa.int64()), "value": pa.array(said, pa.string())})


def row_texts(unlabelled: Unlabelled) -> RowTexts:
    """Each row as one text: the text, prompt and answer, or all messages, a line each. Raises RecipeError for what holds none."""
    pieces = list(row_texts_apart(unlabelled))
    return RowTexts(
        np.concatenate([piece.rows for piece in pieces]), [text for piece in pieces for text in piece.texts]
    )


def row_texts_apart(unlabelled: Unlabelled) -> Iterator[RowTexts]:
    """The same, some thousands of rows at a time: the memory may not hold all of them. There is one piece at the least."""
    query, roles = unlabelled.query, {role: name for role, name in unlabelled.texts.items() if role != "refusal"}
    table = text_table(query, roles, "forget")
    filled = chosen(unlabelled.rows, blank_rows(table), False)
    for start in range(0, max(1, len(filled)), AT_ONCE):
        rows = filled[start : start + AT_ONCE]
        names = partial(query.records.row_names, rows)
        samples = sample_table(taken(table, rows), Rendering(), "forget", query.records.numbers(rows), names)
        if "conversation" in samples.column_names:
            read = map(Conversation.from_json, samples["conversation"].to_pylist())
            texts = ["\n".join(filter(None, (each["content"] for each in one.messages))) for one in read]
        else:
            texts = ["\n".join(row) for row in zip(*(samples[role].to_pylist() for role in roles), strict=True)]
        yield RowTexts(rows, texts)


def labelled_once(made_from: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, JSON-able and without the rows' texts, or what it gave before for the same.

    made_from: all that it depends on, JSON-able. Kept in the shared cache with a checksum; what is damaged there is made again.
    """
    file = cache_folder() / "labels" / f"{fingerprint(made_from)}.json"
    known = unsealed(read_json(file))
    if known is None:
        known = make()
        write_text(file, json.dumps(sealed(known)), "SPUNGE_CACHE")
    return known
