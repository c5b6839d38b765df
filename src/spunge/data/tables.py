"""Rows out of tables of any size: Arrow's own `take` copies every chunk of a column first, and fails beyond 2 GB of text."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

REPEATED = 1 << 15  # rows of a chunk that is repeated


def taken(table: pa.Table, rows: np.ndarray | Sequence[int]) -> pa.Table:
    """The rows with these numbers, in this order, each column in one piece."""
    numbers = np.asarray(rows, dtype=np.int64)
    return pa.table([_taken(column, numbers) for column in table.columns], names=table.column_names)


def repeated(value: pa.Scalar, count: int) -> pa.ChunkedArray:
    """A column that says one thing, whose chunks are one and the same."""
    few = pa.repeat(value, min(count, REPEATED))
    whole, rest = divmod(count, max(1, len(few)))
    return pa.chunked_array([few] * whole + [few[:rest]] * bool(rest), value.type)


def _taken(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    if column.num_chunks <= 1:
        return _whole(column.take(pa.array(rows)))
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    stops = np.cumsum([len(chunk) for chunk in column.chunks])
    cuts = np.searchsorted(ascending, stops)
    starts = stops - [len(chunk) for chunk in column.chunks]
    pieces = [
        chunk.take(pa.array(ascending[first:last] - start))
        for chunk, start, first, last in zip(column.chunks, starts, [0, *cuts[:-1]], cuts, strict=True)
        if last > first
    ]
    together = _whole(pa.chunked_array(pieces, column.type))
    return together if np.array_equal(ascending, rows) else together.take(pa.array(np.argsort(order)))


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In one chunk; text of more than 2 GB needs wider offsets for that."""
    if column.num_chunks > 1 and pa.types.is_string(column.type) and column.nbytes >= 2**31 - 1:
        column = column.cast(pa.large_string())
    return pa.chunked_array([column.combine_chunks()], column.type) if column.num_chunks > 1 else column
