"""What an evaluation's subjects are: rows to forget, rows to keep, or both together."""

from collections.abc import Collection, Mapping

import numpy as np

from spunge.data.items import EVERYTHING
from spunge.results import Group


def group_of(
    subject: str, subjects: Collection[str], overall: str | None, of_forget: bool, parts: Collection[str]
) -> Group:
    """What a subject is, by the other subjects of its evaluation, its source and the values to forget.

    overall: the subject of all rows; of_forget: they come from forget's own source; parts: none without a split.
    """
    if subject in parts:
        return "forget"
    # Without a split nothing tells rows to forget from others but their source, and that they were given no name.
    unnamed = not parts and subject == EVERYTHING
    if subject == overall and (set(subjects) & set(parts) or of_forget or unnamed):
        return "together"
    return "keep"


def all_to_forget(
    subjects: Mapping[str, np.ndarray], overall: str | None, of_forget: bool, parts: Collection[str]
) -> bool:
    """Whether all rows together are rows to forget. subjects: their items."""
    if not parts:
        return of_forget
    members = [items for subject, items in subjects.items() if subject in parts]
    return bool(members) and len(np.unique(np.concatenate(members))) == len(subjects[str(overall)])
