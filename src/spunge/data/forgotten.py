"""Which items of an evaluation are rows to forget: by their places in the same source, or by their very texts in another."""

import numpy as np
import pyarrow as pa

from spunge.data.arrays import among
from spunge.data.selection import BESIDE, same_texts
from spunge.data.split import Parts


def forgotten_items(items: pa.Table, rows: np.ndarray | None, parts: Parts) -> np.ndarray | None:  # (items,) of bool
    """Whether each item is a row of a part. None where nothing tells: an item of another source may ask about a row in other words.

    rows: the items' places in forget's own source, -1 for an item that is of none; None: they are of another source.
    """
    if not parts.parts:
        return None
    alike = _alike(items, parts)
    if rows is None:
        return alike if alike is not None and alike.any() else None
    here: np.ndarray = among(rows, parts.rows)
    return here if alike is None else here | ((rows < 0) & alike)


def _alike(items: pa.Table, parts: Parts) -> np.ndarray | None:  # (items,) of bool
    """Which items have the very texts of a row of a part; None where they are not texts of such a form."""
    tables = [part.samples.table for part in parts.parts]
    roles = [name for name in tables[0].column_names if name not in BESIDE]
    if not roles or not set(roles) <= set(items.column_names):
        return None
    return same_texts(items.select(roles), tables)
