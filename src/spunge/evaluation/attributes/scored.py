"""What models that score labels have in common: which labels a row gets by its scores, and what they are read from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from spunge.data.query import ROW
from spunge.data.unlabelled import RowTexts, Unlabelled

DIGITS = 6  # of a score that is kept
SURE = 0.5  # from which a label of several holds, where the recipe says no other


def labelled(
    unlabelled: Unlabelled, read: RowTexts, labels: Sequence[str], scores: Any, threshold: float | None, several: bool
) -> pa.Table:
    """The lines of `Valued`. scores: (n, labels) of the rows that were read, in [0, 1].

    A row has its best label, if that reaches the threshold; of several, every label that reaches it (0.5 by default).
    """
    rated = np.asarray(scores, dtype=np.float64).reshape(len(read.rows), len(labels))
    reached = rated >= (threshold if threshold is not None else SURE if several else 0.0)
    if not several:
        reached &= np.arange(len(labels)) == rated.argmax(axis=1, keepdims=True)
    of_row: dict[int, list[str | None]] = {int(row): [None] for row in unlabelled.rows}
    for row, held in zip(read.rows.tolist(), reached, strict=True):
        of_row[row] = [labels[at] for at in np.flatnonzero(held).tolist()] or [None]
    lines = [(row, label) for row, own in of_row.items() for label in own]
    rows = pa.array([row for row, _ in lines], pa.int64())
    return pa.table({ROW: rows, "value": pa.array([label for _, label in lines], pa.string())})
