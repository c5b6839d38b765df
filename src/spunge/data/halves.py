"""Two halves of an evaluation's items: one to choose settings by (validation), one to judge the choice by (test).

Items are dealt out so that each subject's, and of members and non-members each, are as many in both halves, but for one. Items with
the same content go into the same half: what a choice was made by is not met again in the test.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from spunge.data.query import ROW
from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.recipe.schema import Half


def half_of(
    table: pa.Table,
    subjects: Mapping[str, np.ndarray],
    members: np.ndarray,
    overall: str | None,
    half: Half,
    setting: str,
    seed: int = 0,
) -> np.ndarray:  # (m,)
    """The rows of a table that are in a half, ascending.

    table: (n,) items. subjects: subject -> its items. members: (n,) of bool, which items are members. overall: the subject that
    holds every item. seed: of the draw; the same for every recipe, as that of `limit` is. Raises RecipeError for a subject of
    which a half holds no item.
    """
    names: list[list[str]] = [[] for _ in range(table.num_rows)]
    for subject, items in subjects.items():
        for item in items if subject != overall else ():
            names[item].append(subject)
    validation, test = Counter[tuple[bool, str]](), Counter[tuple[bool, str]]()
    chosen: list[int] = []
    for group in _shuffled(_same(table), seed):
        counted = [(bool(members[item]), name) for item in group for name in names[item]]
        ahead = sum(validation[each] - test[each] for each in counted)
        whole = validation[True, ""] + validation[False, ""] - test[True, ""] - test[False, ""]
        own: Half = "validation" if (ahead, whole) <= (0, 0) else "test"
        counts = validation if own == "validation" else test
        counts.update([*counted, *((bool(members[item]), "") for item in group)])
        chosen += group if own == half else []
    for subject, items in subjects.items():
        inside = np.isin(items[members[items]], chosen)
        if inside.all() or not inside.any():
            raise RecipeError(
                f"{setting}.half: {subject!r} has {len(inside)} item{'s' if len(inside) != 1 else ''}, all in one half; give it "
                "more items, or leave them out by a where"
            )
    return np.array(sorted(chosen), dtype=int)


def _same(table: pa.Table) -> list[list[int]]:
    """Items of the same content together, in the order of the first of each."""
    groups: dict[str, list[int]] = {}
    content = table.drop_columns([name for name in table.column_names if name == ROW])
    for item, values in enumerate(content.to_pylist()):
        groups.setdefault(repr(values), []).append(item)
    return list(groups.values())


def _shuffled(groups: list[list[int]], seed: int) -> list[list[int]]:
    order = np.random.default_rng(seed_for(seed, "half")).permutation(len(groups))
    return [groups[place] for place in order]
