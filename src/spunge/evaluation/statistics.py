"""Scores from items, their differences and what an attack brings back, each with a 95% percentile-bootstrap interval.

Items are drawn with replacement (Efron 1979), and with several seeds the seeds too. The same items and seeds are drawn at
every stage, so that differences are paired. Where every item agrees a bootstrap knows no spread: a share of 0 or 1 gets
Wilson's interval (1927).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spunge.evaluation.evaluator import Measure

RESAMPLES = 2000
LEVEL = 0.95
NORMAL = 1.959964  # quantile of the normal distribution that leaves LEVEL between minus and plus it

Values = Callable[[np.ndarray], np.ndarray]


class Score(NamedTuple):
    metric: str
    value: float  # mean over the seeds
    low: float
    high: float
    n: int
    chance: float | None = None  # what guessing gives
    below_chance: bool | None = None  # the whole interval lies below it
    spread: float | None = None  # standard deviation over the seeds, where there are several


class Difference(NamedTuple):
    """One stage against another on the same items: a difference, or a ratio where the metric is an exponent. A single item
    makes nothing certain."""

    metric: str
    kind: str  # difference or ratio
    value: float
    low: float
    high: float
    n: int

    @property
    def certain(self) -> bool:
        """The interval excludes what no difference would be."""
        same = 1.0 if self.kind == "ratio" else 0.0
        return self.n > 1 and not self.low <= same <= self.high


class Recovery(NamedTuple):
    """The share of what was forgotten that comes back: 0 none, 1 all of it."""

    value: float
    low: float
    high: float
    n: int


def score(measures: Sequence[Measure], items: Sequence[int] | np.ndarray) -> Score:
    """The metric over the given items; `measures`: one a seed."""
    items, first = np.asarray(items), measures[0]
    values, draws = _values(measures, items), _draws(measures, items)
    low, high = _interval(draws)
    if values[0] in (0, 1) and (values == values[0]).all() and all(_is_share(each, items) for each in measures):
        low, high = wilson(int(values[0] * len(items)), len(items))
    spread = float(np.std(values, ddof=1)) if len(measures) > 1 else None
    below = bool(high < first.chance) if first.chance is not None else None
    return Score(first.metric, float(values.mean()), low, high, len(items), first.chance, below, spread)


def worst(measures: Sequence[Measure], parts: Mapping[str, np.ndarray], highest: bool) -> Score:
    """The worst of the parts, which is the highest or the lowest, chosen anew in every draw: its value is therefore a little
    worse than any one part's truth."""
    first = measures[0]
    pick = np.max if highest else np.min
    values = pick(np.stack([_values(measures, items) for items in parts.values()]), axis=0)
    draws = pick(np.stack([_draws(measures, items) for items in parts.values()]), axis=0)
    low, high = _interval(draws)
    count = len(np.unique(np.concatenate(list(parts.values()))))
    spread = float(np.std(values, ddof=1)) if len(measures) > 1 else None
    return Score(first.metric, float(values.mean()), low, high, count, None, None, spread)


def difference(measures: Sequence[Measure], others: Sequence[Measure], items: Sequence[int] | np.ndarray) -> Difference:
    """What `measures` have more than `others`, paired by item (and by seed where both have several)."""
    items, first = np.asarray(items), measures[0]
    ratio = first.transform == "exp"
    sides = [(_values(each, items).mean(), _draws(each, items)) for each in (measures, others)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value, draws = (one / other if ratio else one - other for one, other in zip(*sides, strict=True))
    low, high = _interval(draws)
    kind = "ratio" if ratio else "difference"
    return Difference(first.metric, kind, float(value), low, high, len(items))


def recovery(
    before: Sequence[Measure],
    after: Sequence[Measure],
    attacked: Sequence[Measure],
    items: Sequence[int] | np.ndarray,
) -> Recovery | None:
    """(attacked - after) / (before - after), of logarithms where the metric is an exponent.

    None where the change from before to after is not certain: what was not forgotten can't come back.
    """
    items = np.asarray(items)
    if not difference(after, before, items).certain:
        return None
    scale = np.log if before[0].transform == "exp" else np.asarray
    stages = [(scale(_values(each, items).mean()), scale(_draws(each, items))) for each in (before, after, attacked)]
    with np.errstate(divide="ignore", invalid="ignore"):
        value, draws = ((back - gone) / (was - gone) for was, gone, back in zip(*stages, strict=True))
    low, high = _interval(draws)
    return Recovery(float(value), low, high, len(items))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    share, z = successes / count, NORMAL
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return max(0.0, middle - half), min(1.0, middle + half)


def auroc(scores: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that an item of class 1 scores higher than one of class 0; ties count half.

    (n,), (n,), weights (r, n): how often each item counts -> (r,). nan where a class is missing.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])  # of the groups of equal scores
    positive, negative = (
        np.add.reduceat(weights[:, order] * (classes[order] == side), starts, axis=1) for side in (1, 0)
    )
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: np.ndarray = (positive * (below + negative / 2)).sum(axis=1) / pairs
    return shares


def _values(measures: Sequence[Measure], items: np.ndarray) -> np.ndarray:  # (seeds,)
    return np.array([_of_weights(measure, items)(np.ones((1, len(items))))[0] for measure in measures])


def _draws(measures: Sequence[Measure], items: np.ndarray) -> np.ndarray:
    """(RESAMPLES,): the mean over drawn seeds of the metric on drawn items. The same draws for the same number of items."""
    count, generator = len(items), np.random.default_rng(len(items))
    metrics = [_of_weights(measure, items) for measure in measures]
    by_seed = np.empty((RESAMPLES, len(measures)))
    # In slices, so that a set of a million items needs no 2,000 x 1,000,000 matrix.
    size = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, size):
        drawn = generator.integers(0, count, (min(size, RESAMPLES - start), count))
        rows = np.arange(len(drawn))[:, None]
        flat = np.bincount((rows * count + drawn).ravel(), minlength=len(drawn) * count)
        weights = flat.reshape(len(drawn), count).astype(np.float64)
        for seed, metric in enumerate(metrics):
            by_seed[start : start + size, seed] = metric(weights)
    if len(measures) == 1:
        return by_seed[:, 0]
    seeds = generator.integers(0, len(measures), (RESAMPLES, len(measures)))
    means: np.ndarray = np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1)
    return means


def _of_weights(measure: Measure, items: np.ndarray) -> Values:
    """The metric as a function of how often each item counts: (r, n) -> (r,)."""
    top, bottom = measure.numerator[items].astype(np.float64), measure.denominator[items].astype(np.float64)
    if measure.combine == "auroc":
        return lambda weights: auroc(top, bottom, weights)

    def ratio(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values: np.ndarray = (weights @ top) / (weights @ bottom)
            if measure.transform == "exp":
                values = np.asarray(np.exp(values))
            return values

    return ratio


def _interval(draws: np.ndarray) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]  # a draw without any item that counts has no metric
    if not len(draws):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _is_share(measure: Measure, items: np.ndarray) -> bool:
    plain = measure.combine == "ratio" and measure.transform == "none"
    return plain and bool((measure.denominator[items] == 1).all() and np.isin(measure.numerator[items], (0, 1)).all())
