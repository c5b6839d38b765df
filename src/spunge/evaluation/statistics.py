"""Scores from items: the ratio of sums for each subject, with a 95% percentile-bootstrap interval over items (Efron 1979)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spunge.evaluation.evaluator import Measure

RESAMPLES = 2000
LEVEL = 0.95


class Score(NamedTuple):
    metric: str
    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool


def score(measure: Measure, items: Sequence[int] | np.ndarray) -> Score:
    """The metric over the given items. The same items are drawn for every stage, so that differences are paired."""
    top = measure.numerator[items].astype(np.float64)
    bottom = measure.denominator[items].astype(np.float64)
    count = len(top)
    generator = np.random.default_rng(count)
    tops, bottoms = np.empty(RESAMPLES), np.empty(RESAMPLES)
    # In slices, so that a set of a million items needs no 2,000 x 1,000,000 matrix.
    size = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, size):
        drawn = generator.integers(0, count, (min(size, RESAMPLES - start), count))
        tops[start : start + size] = top[drawn].sum(axis=1)
        bottoms[start : start + size] = bottom[drawn].sum(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(_transformed(tops / bottoms, measure), [tail, 1 - tail])
    value = _transformed(np.array(top.sum() / bottom.sum()), measure)
    return Score(measure.metric, float(value), float(low), float(high), count, measure.higher_is_better)


def _transformed(ratio: np.ndarray, measure: Measure) -> np.ndarray:
    return np.exp(ratio) if measure.transform == "exp" else ratio
