"""Two halves of an evaluation's items: one to choose settings by (validation), one to judge the choice by (test).

Items are dealt out so that each subject has as many in both halves, but for one, and so have members and non-members. Items with
the same content go into the same half: what a choice was made by is not met again in the test.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from spunge.data.items import Items
from spunge.data.query import ROW
from spunge.data.some import members_of, some_of
from spunge.data.split import seed_for
from spunge.errors import RecipeError


def halved(items: Items, seed: int, setting: str) -> tuple[Items, Items]:
    """The validation and the test half of the items, each in their order. `seed`: of the draw.

    Raises RecipeError, which names `setting`, where a subject has too few items to be in both halves.
    """
    owners: list[list[str]] = [[] for _ in range(items.table.num_rows)]
    for subject, own in items.subjects.items():
        for item in own if subject != items.overall else ():
            owners[item].append(subject)
    groups = _alike(items)
    order = np.random.default_rng(seed_for(seed, "halves")).permutation(len(groups))
    members = members_of(items)
    halves = _dealt([groups[place] for place in order], owners, members)
    for subject, whole in items.subjects.items():
        for kind in {members[item] for item in whole}:
            alike = [item for item in whole.tolist() if members[item] == kind]
            if not all(set(alike) & set(half) for half in halves):
                count = f"{len(alike)} item{'s' if len(alike) != 1 else ''}"
                raise RecipeError(
                    f"{setting}: {items.name!r} has {count} of {subject!r}, all in one half; give more, or none by a where"
                )
    validation, test = (some_of(items, np.array(sorted(half), dtype=int)) for half in halves)
    return validation, test


def _alike(items: Items) -> list[list[int]]:
    """Items of the same content together, in the order of the first of each."""
    groups: dict[str, list[int]] = {}
    columns = [name for name in items.table.column_names if name != ROW]
    for item, values in enumerate(items.table.select(columns).to_pylist()):
        groups.setdefault(repr(values), []).append(item)
    return list(groups.values())


def _dealt(
    groups: Sequence[Sequence[int]], owners: Sequence[Sequence[str]], members: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Each group goes to the half that has fewer items of its subjects; where both have as many, to the smaller half."""
    halves: tuple[list[int], list[int]] = ([], [])
    ahead = Counter[tuple[bool, str]]()  # how many more of a subject the first half has
    for group in groups:
        counted = [(members[item], name) for item in group for name in owners[item]]
        more = (sum(ahead[each] for each in counted), len(halves[0]) - len(halves[1]))
        first = more <= (0, 0)
        halves[0 if first else 1].extend(group)
        for each in counted:
            ahead[each] += 1 if first else -1
    return halves
