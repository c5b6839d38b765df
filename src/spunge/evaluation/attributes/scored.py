"""What models that score labels have in common: which labels a row gets by its scores, and what they are read from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

DIGITS = 6  # of a score that is kept
SURE = 0.5  # from which a label of several holds, where the recipe says no other


def held_labels(labels: Sequence[str], scores: Any, threshold: float | None, several: bool) -> list[list[str]]:
    """The labels of each text. scores: (n, labels), in [0, 1].

    A text has its best label, if that reaches the threshold; of several, every label that reaches it (0.5 by default).
    """
    rated = np.asarray(scores, dtype=np.float64).reshape(-1, len(labels))
    reached = rated >= (threshold if threshold is not None else SURE if several else 0.0)
    if not several:
        reached &= np.arange(len(labels)) == rated.argmax(axis=1, keepdims=True)
    return [[labels[at] for at in np.flatnonzero(held).tolist()] for held in reached]
