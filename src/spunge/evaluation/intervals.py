"""95% intervals that stay honest where items are few or all agree.

- A share: Clopper and Pearson 1934 (Biometrika 26:404), exact: whatever the true share, it covers it at least 95 times in 100.
- A difference of shares on the same items: Tango 1998 (Statistics in Medicine 17:891), a score interval. It leaves 0 out only
  where the exact test of McNemar (1947) does so too, so that a change is never claimed too often.
- Where all items agree there is no spread to go by, and 0.00 [0.00 0.00] would be certain of everything. A value within bounds gets
  the exact interval of the share of items that may be otherwise, times how far they may be (the rule of three of Hanley and
  Lippman-Hand 1983, exactly). A value without bounds has no interval.
- Any difference of fewer than 6 items reaches no difference. Student's t is right where items vary as a normal distribution, which
  so few cannot show; the test that takes nothing for granted, of the signs (Dixon and Mood 1946, JASA 41:557), gives five items
  that all change a p of 0.06. So does McNemar's, which is that test on shares.
- Any other value of few items, or of few seeds: Student's t. Of more: quantiles of bootstrap draws, further out by what few items
  make them too narrow (Hesterberg 2015, The American Statistician 69:371).

Every function takes `tail`, what is to lie beyond each end: 0.025.
"""

from collections.abc import Sequence
from math import nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, ndtr, stdtrit

from spunge.results import FEWEST_CERTAIN

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
NORMAL = 1.959964  # quantile of the normal distribution that leaves TAIL above it


class Interval(NamedTuple):
    low: float
    high: float


UNKNOWN = Interval(nan, nan)


def exact(successes: float, count: float, tail: float = TAIL) -> Interval:
    """Clopper's and Pearson's interval of a share. Counts may be fractions, as of items that weigh unlike."""
    failures = count - successes
    low = float(betaincinv(successes, failures + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures > 0 else 1.0
    return Interval(low, high)


def paired(rose: int, fell: int, count: int) -> Interval:
    """Tango's interval of (rose - fell) / count, where of `count` items so many became 1 and so many became 0. Where McNemar's
    exact test finds nothing, it reaches 0."""
    change = (rose - fell) / count
    low, high = _tango(rose, fell, count, NORMAL, -1.0, change), _tango(rose, fell, count, -NORMAL, change, 1.0)
    if exact(max(rose, fell), rose + fell).low <= 0.5:
        return Interval(min(low, 0.0), max(high, 0.0))
    return Interval(low, high)


def _tango(rose: int, fell: int, count: int, target: float, low: float, high: float) -> float:
    """The difference between `low` and `high` that lies `target` standard errors below what was seen."""
    for _ in range(60):
        middle = (low + high) / 2
        # The share that falls, most likely where the difference is `middle`: a root of 2n q^2 + b q + c.
        b = (2 * count - rose + fell) * middle - rose - fell
        c = -fell * middle * (1 - middle)
        falls = (sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
        variance = count * max(0.0, 2 * falls + middle * (1 - middle))
        if rose - fell - count * middle > target * sqrt(variance):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def agreeing(value: float, count: float, least: float, most: float, tail: float = TAIL) -> Interval:
    """Of a mean between `least` and `most` to which every item gives `value`."""
    others = exact(0, count, tail).high
    return Interval(value - others * (value - least), value + others * (most - value))


def reaching(ends: Interval, same: float, count: int) -> Interval:
    """A difference's interval, which reaches `same`, no difference, where there are fewer items than FEWEST_CERTAIN."""
    return ends if count >= FEWEST_CERTAIN else Interval(min(ends.low, same), max(ends.high, same))


def student(value: float, variances: Sequence[tuple[float, int]], tail: float = TAIL) -> Interval:
    """Of a value whose variance is a sum of estimates, each from so many draws: of one, Student's t. Of several each part has its
    own t, in squares, which is as wide as Cochran 1964 (Biometrics 20:191) or wider."""
    total = sum(variance for variance, _ in variances)
    if min(count for _, count in variances) < 2 or not np.isfinite(total):
        return UNKNOWN
    half = sqrt(sum(variance * float(stdtrit(count - 1, 1 - tail)) ** 2 for variance, count in variances))
    return Interval(value - half, value + half)


def percentiles(draws: np.ndarray, count: int, tail: float = TAIL) -> Interval:
    """Hesterberg's expanded percentiles of bootstrap draws. A draw without any item that counts is nan, and left out."""
    draws = draws[~np.isnan(draws)]
    if not len(draws) or count < 2:
        return UNKNOWN
    wider = float(ndtr(-sqrt(count / (count - 1)) * stdtrit(count - 1, 1 - tail)))
    low, high = np.quantile(draws, [wider, 1 - wider])
    return Interval(float(low), float(high))
