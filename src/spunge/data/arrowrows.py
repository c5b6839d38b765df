"""Rows of Parquet, Arrow and Feather files, a few MB at a time, with plain types."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spunge.data.decoding import COMPRESSIONS, DAMAGES, UnreadableError, open_bytes
from spunge.data.keeping import Keeper
from spunge.data.kinds import TEXT, fitted, plain_kind
from spunge.data.mapping import mapped

CHUNK = 1 << 24  # bytes of a table at a time, by the mean of its rows


def read_arrow(file: Path, ending: str, text: Sequence[str], keeper: Callable[[], Keeper]) -> pa.Table:
    """The file's rows. text: columns that are text whatever they hold. Raises UnreadableError."""
    try:
        with keeper() as kept:
            for batch in (_of_parquet if ending == ".parquet" else _of_arrow)(_source(file)):
                _refuse_invalid(batch, kept.rows, full=True)
                kept.add(plain_table(pa.table(batch), text))
            return kept.table()
    except (pa.ArrowException, UnicodeDecodeError, *DAMAGES) as error:
        raise UnreadableError(" ".join(str(error).split()) or "it is cut short") from None


def plain_table(table: pa.Table, text: Sequence[str] = ()) -> pa.Table:
    """The table with types that SQL and the rest of the program know, without metadata. Raises UnreadableError."""
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise UnreadableError(f"two of its columns are called {name!r}; rename one")
    kinds = [
        TEXT if name in text else plain_kind(column.type) for name, column in zip(names, table.columns, strict=True)
    ]
    columns = [fitted(column, kind) for column, kind in zip(table.columns, kinds, strict=True)]
    return pa.table(columns, names=names)


def _source(file: Path) -> Any:
    """A file that can be read from anywhere in it."""
    if file.suffix.lower() in COMPRESSIONS:
        with open_bytes(file) as stream:
            return io.BytesIO(stream.read())
    return str(file)


def _of_parquet(source: Any) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source) as parquet:
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        width = sum(group.total_byte_size for group in groups) // max(1, parquet.metadata.num_rows)
        if not parquet.metadata.num_rows:
            yield pa.RecordBatch.from_pylist([], parquet.schema_arrow)
        count = 0
        for batch in parquet.iter_batches(batch_size=max(1, CHUNK // max(1, width))):
            count += batch.num_rows
            yield batch
        if count != parquet.metadata.num_rows:  # Arrow gives what there is, without a word
            raise UnreadableError(f"it holds {count} rows and says that it holds {parquet.metadata.num_rows}")


def _of_arrow(source: Any) -> Iterator[pa.RecordBatch]:
    batches: Iterator[pa.RecordBatch]
    if isinstance(source, str):
        with open(source, "rb") as stream:
            source = pa.BufferReader(pa.py_buffer(mapped(stream)))
    try:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:  # no file, but a stream
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        batches = iter(reader)
    yield pa.RecordBatch.from_pylist([], reader.schema)
    for batch in batches:
        _refuse_invalid(batch, 0, full=False)  # of a damaged one, Arrow would count bytes beyond its buffers, and crash
        step = max(1, batch.num_rows * CHUNK // max(1, batch.nbytes))
        yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _refuse_invalid(batch: pa.RecordBatch, before: int, full: bool) -> None:
    """Raises UnreadableError for a batch whose values do not lie in its buffers. full: also for what is no UTF-8."""
    try:
        batch.validate(full=full)
    except (pa.ArrowInvalid, IndexError) as error:
        rows = f"rows {before + 1} to {before + batch.num_rows}"
        raise UnreadableError(f"{rows}: {str(error).splitlines()[0]}") from None
