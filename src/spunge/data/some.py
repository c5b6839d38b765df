"""Some of an evaluation's items."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spunge.data.items import MEMBER, Items
from spunge.data.samples import table_sha256
from spunge.data.split import draw, seed_for
from spunge.data.tables import taken


def members_of(items: Items) -> Sequence[bool]:
    """Which items are members, where the rows tell. The others count for every subject."""
    told = MEMBER in items.table.column_names
    return list(map(bool, items.table[MEMBER].to_pylist())) if told else [True] * items.table.num_rows


def some_of(items: Items, rows: np.ndarray) -> Items:
    """The given items, ascending, of the same subjects."""
    table = taken(items.table, rows)
    subjects = {name: np.searchsorted(rows, own[np.isin(own, rows)]) for name, own in items.subjects.items()}
    forgotten = None if items.forgotten is None else items.forgotten[rows]
    return replace(items, table=table, subjects=subjects, sha256=table_sha256(table), forgotten=forgotten)


def at_most(items: Items, own: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of a subject's items, drawn: the same ones each time. Members and others are drawn apart."""
    members = np.array(members_of(items))[own]
    kinds = [own[members], own[~members]]
    return np.sort(np.concatenate([draw(each, limit, seed_for(0, "items")) for each in kinds]))
