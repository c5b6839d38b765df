"""Rows out of tables that are too large for Arrow's own ways: its text of 32 bits ends at 2 GB."""

import mmap

import numpy as np
import pyarrow as pa
import pytest

from spunge.data.query import BATCH, Query
from spunge.data.rows import Records
from spunge.data.samples import Samples
from spunge.data.tables import taken


@pytest.fixture
def large() -> pa.Table:
    """Three chunks of text of 1.5 GB each, in memory that nothing was written to: zeros, which cost no memory."""
    size = 3 << 29
    memory = mmap.mmap(-1, size)
    offsets = np.array([0, 5, 10, size], dtype=np.int32)
    chunk = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(memory))
    return pa.table({"text": pa.chunked_array([chunk] * 3)})


def test_rows_of_a_column_of_more_than_2_gb_are_given_as_texts(large: pa.Table) -> None:
    assert large["text"].nbytes > 2**32
    rows = [7, 0, 3, 1]
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        large.take(pa.array(rows))
    assert taken(large, rows)["text"].to_pylist() == ["\0" * 5] * 4
    assert [text.completion for text in Samples(large).texts(rows, None)] == ["\0" * 5] * 4


def test_what_sql_makes_comes_in_pieces_that_text_of_32_bits_can_hold() -> None:
    table = pa.table({"text": [str(number) for number in range(3 * BATCH)]})
    made = Query(Records(table)).project({"text": "upper(text)"}, "forget.")["text"]
    assert max(len(chunk) for chunk in made.chunks) <= BATCH
    assert made.to_pylist() == table["text"].to_pylist()
