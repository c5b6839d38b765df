"""What a model is compared with must not be what it knows: unseen rows that it was taught or is to forget, and the base itself."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spunge.data.items import MEMBER, Items
from spunge.data.query import ROW
from spunge.data.selection import BESIDE, same_texts
from spunge.errors import RecipeError
from spunge.registry import EVALUATORS
from spunge.run.inputs import BaseInputs
from spunge.weights.checkpoint import Checkpoint


def refuse_seen(evaluations: Sequence[Items], base: BaseInputs) -> None:
    """Raises RecipeError, before anything is trained, for rows that are said to be unseen and are not, and for a model beside the
    base that is the base."""
    for items in evaluations:
        evaluator = EVALUATORS.get(items.settings.kind)
        if evaluator.unseen(items.settings) and items.forgotten is not None and items.forgotten.any():
            raise RecipeError(
                f"evaluate: {_counted(items, items.forgotten)} of {items.name!r}, which the model must not have seen, are rows to "
                "forget; leave them out by a where"
            )
        for known, what in ((items.forgotten, "are rows to forget"), (_taught(items, base), "were taught")):
            outside = _non_members(items, known)
            if outside.any():
                raise RecipeError(
                    f"evaluate: {_counted(items, outside)} of {items.name!r} are non-members and {what}; leave them out of these"
                )
        if (path := evaluator.beside(items.settings)) is not None and _is_base(path, base):
            raise RecipeError(
                f"evaluate: {items.name!r} compares with {path!r}, which has the weights of the base itself; give another model"
            )


def _counted(items: Items, chosen: np.ndarray) -> str:
    """`3 rows (first: row 5)`."""
    return f"{int(chosen.sum())} rows (first: row {items.table[ROW][int(np.flatnonzero(chosen)[0])].as_py()})"


def _non_members(items: Items, known: np.ndarray | None) -> np.ndarray:  # (items,) of bool
    """Which of some items are non-members; none where nothing is known of them."""
    if known is None or MEMBER not in items.table.column_names:
        return np.zeros(items.table.num_rows, dtype=bool)
    members = np.array(items.table[MEMBER].to_pylist(), dtype=bool)
    outside: np.ndarray = known & ~members
    return outside


def _taught(items: Items, base: BaseInputs) -> np.ndarray | None:  # (items,) of bool
    """Which items have the very texts of a row that is taught; None where nothing tells."""
    if base.recipe.teach is None or base.lesson is None:
        return None
    lesson = base.lesson.samples.table
    roles = [name for name in lesson.column_names if name not in BESIDE]
    if not set(roles) <= set(items.table.column_names):
        return None
    return same_texts(items.table.select(roles), [lesson])


def _is_base(path: str, base: BaseInputs) -> bool:
    """Whether a folder holds the base's weights, as far as the base is there already."""
    folder = Path(os.path.expanduser(path))
    if not any(folder.glob("*.safetensors")) or not any(base.folder.glob("*.safetensors")):
        return False
    return Checkpoint(folder).fingerprint() == base.weights
