"""The texts of rows: one column for each role (text, prompt, completion, messages, refusal), and which rows lack one."""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spunge.data.arrays import blocks, chosen, joined
from spunge.data.guessing import reading_told, readings
from spunge.data.query import Query
from spunge.data.tables import taken
from spunge.errors import RecipeError, suggestion

WORD_ENDS, WORD_BEGINS = r"[0-9A-Za-z.,:;?!]\z", r"\A[0-9A-Za-z]"  # of scripts that part words by spaces


def text_table(query: Query, columns: Mapping[str, str], setting: str) -> pa.Table:
    """All rows with a column for each role. Raises RecipeError for what is no column and no SQL, and for what holds no text."""
    if columns.get("text") == "text" and query.column("text") is None and (ways := readings(query)):
        raise RecipeError(
            f"{setting}: the rows have no column 'text'; name theirs, such as {setting}.{reading_told(ways[0])}"
        )
    table = query.project(columns, f"{setting}.")
    for role, given in columns.items():
        refuse_other_types(table[role].type, given, f"{setting}.{role}", nested=role != "text")
    return table


def refuse_other_types(kind: pa.DataType, given: str, setting: str, nested: bool) -> None:
    """Raises RecipeError where a column holds something else than text. nested: lists and records are conversations."""
    if not (pa.types.is_string(kind) or pa.types.is_null(kind) or (nested and pa.types.is_nested(kind))):
        raise RecipeError(f"{setting}: {given!r} holds {kind}, not text; as text it is: CAST({given} AS VARCHAR)")


def refuse_files_without(query: Query, columns: Mapping[str, str], rows: np.ndarray, setting: str) -> None:
    """Raises RecipeError where the rows of one of several files are wanted and it has no such column."""
    firsts = [origin.first for origin in query.records.origins]
    ends = np.searchsorted(rows, [*firsts[1:], query.rows])  # of the wanted rows, which ascend
    starts = np.searchsorted(rows, firsts)
    wanted = (
        [origin for origin, start, end in zip(query.records.origins, starts, ends, strict=True) if start < end]
        if firsts
        else []
    )
    for role, given in columns.items():
        name = query.column(given)
        for origin in wanted:
            if name is not None and name not in origin.columns:
                raise RecipeError(
                    f"{setting}.{role}: no column {name!r} in {origin.name}{suggestion(name, origin.columns)}; leave its rows "
                    "out by a where, or give the files as sources of their own"
                )


def blank_rows(texts: pa.Table) -> np.ndarray:  # (n,) of bool
    """Whether each row lacks one of its texts."""
    masks = [blank(column) for column in texts.columns]
    return joined((np.logical_or.reduce([mask[part] for mask in masks]) for part in blocks(texts.num_rows)), bool)


def blank(column: pa.ChunkedArray) -> np.ndarray:  # (n,) of bool
    """Whether each row is null, an empty list, or a text of nothing but white space."""
    # Chunk by chunk, as trimming copies the texts.
    return joined(map(_blank, column.chunks), bool)


def _blank(chunk: pa.Array) -> np.ndarray:
    if pa.types.is_string(chunk.type):
        empty = pc.equal(pc.utf8_trim_whitespace(chunk), "")
    elif pa.types.is_list(chunk.type):
        empty = pc.equal(pc.list_value_length(chunk), 0)
    else:
        empty = pc.is_null(chunk)
    return np.asarray(pc.fill_null(empty, True).to_numpy(zero_copy_only=False))


def left_out(query: Query, empty: np.ndarray, roles: Iterable[str], rows: np.ndarray, whose: str) -> list[str]:
    """A remark on the rows whose text is empty, if there are any."""
    without = chosen(rows, empty)
    if not len(without):
        return []
    first = query.records.row_name(int(without[0]))
    return [f"{whose}: {len(without)} of {len(rows)} rows are left out, empty in {' or '.join(roles)} (first: {first})"]


def unspaced(texts: pa.Table, rows: np.ndarray, whose: str) -> list[str]:
    """A remark where word touches word between the prompt and the completion of every row, as in `the Sun?Mercury`."""
    if not {"prompt", "completion"} <= set(texts.column_names) or not len(rows):
        return []
    kinds = [texts[name].type for name in ("prompt", "completion")]
    if not all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
        return []
    some = texts.select(["prompt", "completion"])
    for part in blocks(len(rows)):
        pair = taken(some, rows[part])
        ending = pc.match_substring_regex(pair["prompt"], WORD_ENDS)
        if not pc.all(pc.and_(ending, pc.match_substring_regex(pair["completion"], WORD_BEGINS))).as_py():
            return []
    first = taken(some, rows[:1]).to_pylist()[0]
    shown = first["prompt"][-10:] + first["completion"][:10]
    return [
        f"{whose}: no row has white space between prompt and completion ({shown!r}), and none is put there; where it belongs, "
        f"write it into {whose}.prompt, as in `question || ' '`"
    ]
