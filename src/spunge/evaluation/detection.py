"""How many items of class 1 scores find at few false alarms, with an interval that knows how few alarms there were to see."""

import numpy as np
from scipy.special import bdtr

from spunge.evaluation.intervals import TAIL, Interval, exact


def detected(scores: np.ndarray, classes: np.ndarray, weights: np.ndarray, false: float) -> np.ndarray:
    """The share of class 1 from the lowest score on from which on at most the share `false` of class 0 lies.

    (n,), (n,) of 1 and 0, weights (r, n): how often each item counts -> (r,). nan where a class is missing.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])  # of the groups of equal scores
    hits, alarms = (
        np.add.reduceat(weights[:, order] * (classes[order] == side), starts, axis=1).cumsum(axis=1) for side in (1, 0)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        hits, alarms = hits / hits[:, -1:], alarms / alarms[:, -1:]
    shares: np.ndarray = np.where(alarms <= false, hits, 0.0).max(axis=1)
    return np.where(np.isnan(alarms[:, -1]) | np.isnan(hits[:, -1]), np.nan, shares)


def detected_interval(scores: np.ndarray, classes: np.ndarray, false: float, tail: float = TAIL) -> Interval:
    """An interval of `detected` that holds the truth, whatever the scores are like. Shapes as there.

    The threshold is as uncertain as the share above it, so that each has half of the tail. The number of items of class 0 above
    the true threshold is binomial, which bounds it by two of their scores; with too few of them (437 for a share of 1%) nothing
    bounds it from above, and the interval begins at 0.
    """
    ones, others = scores[classes == 1], np.sort(scores[classes == 0])[::-1]
    below = bdtr(
        np.arange(len(others) + 1.0), len(others), false
    )  # chance of so many above the true threshold, or fewer
    fewest, most = int(np.argmax(below > tail / 2)), int(np.argmax(below >= 1 - tail / 2))
    certain = int((ones >= others[fewest - 1]).sum()) if fewest else 0
    possible = int((ones > others[most]).sum()) if most < len(others) else len(ones)
    return Interval(exact(certain, len(ones), tail / 2).low, exact(possible, len(ones), tail / 2).high)
