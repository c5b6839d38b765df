"""Figures made of several evaluations, or of one beside a reference: formulas over draws.

Arrays hold a row for each draw of the items and a column for each seed; a reference has one column for all seeds.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np

SMALLEST = 1e-300  # a p-value below it is 0 in floats, and has no logarithm


def harmonic_mean(shares: Sequence[np.ndarray]) -> np.ndarray:
    """k / (1/x1 + ... + 1/xk): k times (r, s) -> (r, s). 0 where one of them is 0; nan where one is negative or nan."""
    stacked = np.stack(shares)
    with np.errstate(divide="ignore", invalid="ignore"):
        means: np.ndarray = np.where((stacked >= 0).all(axis=0), len(shares) / (1 / stacked).sum(axis=0), np.nan)
    return means


def ks_distance(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Largest distance between the distributions of two models' values of the same items.

    one, other: (n,); weights (r, n): how often each item counts -> (r,).
    """
    values = np.concatenate([one, other])
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(values[order]) != 0, True])  # the last of each group of equal values
    signed = np.concatenate([weights, -weights], axis=1)[:, order]
    gaps: np.ndarray = np.abs(np.cumsum(signed, axis=1)[:, ends]).max(axis=1) / weights.sum(axis=1)
    return gaps


def ks_pvalue(distance: float, count: int) -> float:
    """Of two samples of `count` each, without ties: scipy's, exact up to 10,000 of them."""
    return _pvalue(round(distance * count), count)


@cache
def _pvalue(steps: int, count: int) -> float:
    from scipy.stats import ks_2samp

    if not steps:
        return 1.0
    first = np.arange(count, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # that it is too small to be counted out, and comes of a formula
        # The distance alone decides: the same values, moved on by so many places, have it.
        return float(ks_2samp(first, first + steps - 0.5).pvalue)


def log_pvalue(pvalues: np.ndarray) -> np.ndarray:
    """To base 10; of one that is 0 in floats that of the smallest."""
    logs: np.ndarray = np.log10(np.maximum(pvalues, SMALLEST))
    return logs


def relative_leak(area: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """100 (A - A_reference) / A_reference: (r, s), (r, 1) -> (r, s)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        leaks: np.ndarray = 100 * (area - reference) / reference
    return leaks
