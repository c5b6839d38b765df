"""Scores from items, their differences and what an attack brings back, each with a 95% interval.

Which interval depends on the metric and on the number of items: see intervals.py. Where it is a bootstrap's, items are drawn with
replacement (Efron 1979), and with several seeds the seeds too; the same items and seeds at every stage, so that differences are
paired.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from spunge.evaluation.detection import detected, detected_interval
from spunge.evaluation.evaluator import Measure
from spunge.evaluation.intervals import TAIL, UNKNOWN, Interval, agreeing, exact, paired, percentiles, reaching, student
from spunge.results import SMALL_SAMPLE

RESAMPLES = 2000
SAME = 1e-9  # items that differ by less than this share of the value agree

Values = Callable[[np.ndarray], np.ndarray]
Draws = Callable[[], np.ndarray]


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
    """One stage against another on the same items: a difference, or a ratio where the metric is an exponent."""

    metric: str
    kind: str  # difference or ratio
    value: float
    low: float
    high: float
    n: int
    changed: int  # items that were not measured the same

    @property
    def certain(self) -> bool:
        """The interval excludes what no difference would be."""
        same = 1.0 if self.kind == "ratio" else 0.0
        return self.low > same or self.high < same


class Recovery(NamedTuple):
    """The share of what was forgotten that comes back: 0 none, 1 all of it."""

    value: float
    low: float
    high: float
    n: int


class Linear(NamedTuple):
    """A metric as a mean over items: its value (its logarithm, where it is an exponent) and what each item adds to that."""

    value: float  # mean over the seeds
    parts: tuple[np.ndarray, ...]  # what each item adds, centred; of an AUROC, of either class
    n: int  # items that count; of an AUROC, of the smaller class
    alike: float  # items of one weight that would say as much
    bounds: tuple[float, float] | None  # that the value cannot leave
    by_seed: tuple[float, ...] = ()  # the value of each seed

    @property
    def agree(self) -> bool:
        """No item adds more than another, at any seed."""
        largest = max((float(np.max(np.abs(part), initial=0.0)) for part in self.parts), default=0.0)
        return len(set(self.by_seed)) <= 1 and largest <= SAME * max(1.0, abs(self.value))

    @property
    def variances(self) -> list[tuple[float, int]]:
        """Of the value: what the items and what several seeds add to it, and from how many each was estimated."""
        of_items = float(sum(np.var(part, ddof=1) / len(part) for part in self.parts))
        seeds = len(self.by_seed)
        of_seeds = [(float(np.var(self.by_seed, ddof=1)) / seeds, seeds)] if seeds > 1 else []
        return [(of_items, self.n), *of_seeds]


def score(measures: Sequence[Measure], items: Sequence[int] | np.ndarray) -> Score:
    """The metric over the given items; `measures`: one a seed."""
    items, first = np.asarray(items), measures[0]
    values = _values(measures, items)
    low, high = _interval(measures, items, cache(partial(_draws, measures, items)))
    spread = float(np.std(values, ddof=1)) if len(measures) > 1 else None
    below = bool(high < first.chance) if first.chance is not None else None
    return Score(first.metric, float(values.mean()), low, high, len(items), first.chance, below, spread)


def worst(measures: Sequence[Measure], parts: Mapping[str, np.ndarray], highest: bool) -> Score:
    """The worst of the parts, which is the highest or the lowest: its value is therefore a little worse than any one part's truth.

    The interval holds whichever part is the worst in truth. What is worse than the worst part is worse than that part, so one
    end is the worst of the parts' ends; for the other, the tail is divided by the number of parts (Bonferroni).
    """
    pick = np.max if highest else np.min
    values = pick(np.stack([_values(measures, items) for items in parts.values()]), axis=0)
    near, far = [], []
    for items in parts.values():
        draws = cache(partial(_draws, measures, items))
        far.append(_interval(measures, items, draws)[int(highest)])
        near.append(_interval(measures, items, draws, TAIL / len(parts))[int(not highest)])
    value, ends = float(values.mean()), (float(pick(near)), float(pick(far)))
    low, high = (ends[0], max(ends[1], value)) if highest else (min(ends[1], value), ends[0])
    count = len(np.unique(np.concatenate(list(parts.values()))))
    spread = float(np.std(values, ddof=1)) if len(measures) > 1 else None
    return Score(measures[0].metric, value, low, high, count, None, None, spread)


def difference(measures: Sequence[Measure], others: Sequence[Measure], items: Sequence[int] | np.ndarray) -> Difference:
    """What `measures` have more than `others`, paired by item (and by seed where both have several)."""
    items, first = np.asarray(items), measures[0]
    ratio = first.transform == "exp"
    values = [_values(each, items).mean() for each in (measures, others)]

    def compared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(one / other if ratio else one - other)

    draws = cache(lambda: compared(_draws(measures, items), _draws(others, items)))
    changed = _changed(measures, others, items)
    if first.combine == "detected":  # two thresholds, which no item stands for: both ends of both intervals
        one, other = (_interval(each, items, draws, TAIL / 2) for each in (measures, others))
        low, high = one.low - other.high, one.high - other.low
    elif (
        not (linear := _less(_linear(measures, items), _linear(others, items))).agree
        and len(measures) == len(others) == 1
        and _is_share(first, items)
        and _is_share(others[0], items)
    ):
        moved = first.numerator[items] - others[0].numerator[items]
        low, high = paired(int((moved > 0).sum()), int((moved < 0).sum()), len(items))
    else:
        low, high = reaching(_ends(linear, draws, ratio), 1.0 if ratio else 0.0, linear.n)
    value = float(compared(*values))
    return Difference(
        first.metric, "ratio" if ratio else "difference", value, low, high, len(items), int(changed.sum())
    )


def recovery(
    before: Sequence[Measure],
    after: Sequence[Measure],
    attacked: Sequence[Measure],
    items: Sequence[int] | np.ndarray,
) -> Recovery | None:
    """(attacked - after) / (before - after), of logarithms where the metric is an exponent.

    None where the change from before to after is not certain: what was not forgotten can't come back. None too of a rate that is
    read at a threshold, whose change no item stands for.
    """
    items = np.asarray(items)
    if before[0].combine == "detected" or not difference(after, before, items).certain:
        return None
    scale = np.log if before[0].transform == "exp" else np.asarray
    was, gone, back = (scale(_values(each, items).mean()) for each in (before, after, attacked))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float((back - gone) / (was - gone))

    def draws() -> np.ndarray:
        was, gone, back = (scale(_draws(each, items)) for each in (before, after, attacked))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((back - gone) / (was - gone))

    fallen, risen = (_less(_linear(each, items), _linear(after, items)) for each in (before, attacked))
    shares = [(part - value * of) / fallen.value for part, of in zip(risen.parts, fallen.parts, strict=True)]
    pairs = zip(*_paired(risen.by_seed, fallen.by_seed), strict=True)
    by_seed = tuple((one - value * other) / fallen.value for one, other in pairs)
    linear = fallen._replace(value=value, parts=tuple(shares), by_seed=by_seed)
    if linear.agree:  # all of it comes back of every item, or nothing of any: of those that had something to bring back
        count = int(_changed(before, after, items).sum())
        known = fallen.bounds is not None and value in (0, 1)
        low, high = exact(value * count, count) if known else UNKNOWN
    else:
        low, high = _ends(linear._replace(bounds=None), draws, False)
    return Recovery(value, low, high, len(items))


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
    return over_seeds(draws_by_seed(measures, items, len(items)))


def values_by_seed(measures: Sequence[Measure], items: np.ndarray) -> np.ndarray:  # (1, seeds)
    return _values(measures, items)[None, :]


def draws_by_seed(measures: Sequence[Measure], items: np.ndarray, stream: int) -> np.ndarray:
    """(RESAMPLES, seeds): the metric on drawn items. `stream`: which draws; the same for the same number of items."""
    metrics = [_of_weights(measure, items) for measure in measures]
    slices = [
        np.stack([metric(weights) for metric in metrics], axis=1) for weights in drawn_weights(len(items), stream)
    ]
    return np.concatenate(slices)


def drawn_weights(count: int, stream: int) -> Iterator[np.ndarray]:
    """How often each of `count` items is drawn, (r, count), until there are RESAMPLES rows."""
    generator = np.random.default_rng(stream)
    # In slices, so that a set of a million items needs no 2,000 x 1,000,000 matrix.
    size = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, size):
        drawn = generator.integers(0, count, (min(size, RESAMPLES - start), count))
        rows = np.arange(len(drawn))[:, None]
        flat = np.bincount((rows * count + drawn).ravel(), minlength=len(drawn) * count)
        yield flat.reshape(len(drawn), count).astype(np.float64)


def over_seeds(by_seed: np.ndarray) -> np.ndarray:
    """(RESAMPLES, seeds) -> (RESAMPLES,): the mean over seeds that are drawn, too; the same ones for the same number of them."""
    count = by_seed.shape[1]
    if count == 1:
        return by_seed[:, 0]
    seeds = np.random.default_rng(count).integers(0, count, by_seed.shape)
    means: np.ndarray = np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1)
    return means


def _of_weights(measure: Measure, items: np.ndarray) -> Values:
    """The metric as a function of how often each item counts: (r, n) -> (r,)."""
    top, bottom = measure.numerator[items].astype(np.float64), measure.denominator[items].astype(np.float64)
    if measure.combine == "auroc":
        return lambda weights: auroc(top, bottom, weights)
    if measure.combine == "detected":
        return lambda weights: detected(top, bottom, weights, measure.false or 0.0)

    def ratio(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values: np.ndarray = (weights @ top) / (weights @ bottom)
            if measure.transform == "exp":
                values = np.asarray(np.exp(values))
            return values

    return ratio


def _interval(measures: Sequence[Measure], items: np.ndarray, draws: Draws, tail: float = TAIL) -> Interval:
    """Of the metric's value."""
    if measures[0].combine == "detected":
        each = [
            detected_interval(one.numerator[items], one.denominator[items], one.false or 0.0, tail) for one in measures
        ]
        return Interval(min(ends.low for ends in each), max(ends.high for ends in each))
    if len(measures) == 1 and _is_share(measures[0], items):
        return exact(float(measures[0].numerator[items].sum()), len(items), tail)
    exponent = measures[0].transform == "exp"
    ends = _ends(_linear(measures, items), draws, exponent, tail)
    # Student's t knows no bounds; a perplexity, of likelihoods of tokens, is never under 1.
    positive = exponent and all((one.numerator[items] >= 0).all() for one in measures)
    return ends._replace(low=1.0) if positive and ends.low < 1 <= ends.high else ends


def _ends(linear: Linear, draws: Draws, exponent: bool, tail: float = TAIL) -> Interval:
    """The interval of a value or a difference that is no share of items. `draws`: of what the exponent is taken of already."""
    if linear.agree:
        return agreeing(linear.value, linear.alike, *linear.bounds, tail) if linear.bounds else UNKNOWN
    # Of few seeds draws would miss a share of their spread.
    few_seeds = 1 < len(linear.by_seed) < SMALL_SAMPLE
    if linear.n >= SMALL_SAMPLE and not few_seeds:
        return percentiles(draws(), linear.n, tail)
    if linear.n < 2 or not np.isfinite(linear.value):
        return UNKNOWN
    ends = student(linear.value, linear.variances, tail)
    if linear.bounds is not None:
        return Interval(max(linear.bounds[0], ends.low), min(linear.bounds[1], ends.high))
    with np.errstate(over="ignore"):
        return Interval(float(np.exp(ends.low)), float(np.exp(ends.high))) if exponent else ends


def _linear(measures: Sequence[Measure], items: np.ndarray) -> Linear:
    each = [_linear_of(measure, items) for measure in measures]
    values = np.array([one.value for one in each])
    parts = tuple(np.mean(same, axis=0) for same in zip(*(one.parts for one in each), strict=True))
    return each[0]._replace(value=float(values.mean()), parts=parts, by_seed=tuple(values.tolist()))


def _linear_of(measure: Measure, items: np.ndarray) -> Linear:
    """Of one seed."""
    top, bottom = measure.numerator[items].astype(np.float64), measure.denominator[items].astype(np.float64)
    if measure.combine == "auroc":
        # What each item adds to an AUROC: the share of the other class that it is on the right side of (DeLong 1988).
        known, others = np.sort(top[bottom == 1]), np.sort(top[bottom == 0])
        if not len(known) or not len(others):
            return Linear(float("nan"), (), 0, 0, None)
        above = (np.searchsorted(others, known) + np.searchsorted(others, known, "right")) / (2 * len(others))
        below = (np.searchsorted(known, others) + np.searchsorted(known, others, "right")) / (2 * len(known))
        value = float(above.mean())
        fewer = min(len(known), len(others))
        return Linear(value, (above - value, 1 - below - value), fewer, fewer, (0.0, 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, alike = float(top.sum() / bottom.sum()), float(bottom.sum() ** 2 / (bottom**2).sum())
        # n - 1 times what the value would lose without the item: Tukey's jackknife (1958), of which a heavy item takes more.
        rest = bottom.sum() - bottom
        adds = np.where(rest > 0, (len(items) - 1) * (top - value * bottom) / rest, 0.0)
    share = measure.transform == "none" and bool(((top >= 0) & (top <= bottom)).all())
    return Linear(value, (adds,), int((bottom > 0).sum()), alike, (0.0, 1.0) if share else None)


def _less(one: Linear, other: Linear) -> Linear:
    """The difference of two metrics of the same items."""
    parts = tuple(mine - theirs for mine, theirs in zip(one.parts, other.parts, strict=True))
    fewer, alike = min(one.n, other.n), min(one.alike, other.alike)
    bounds = (-1.0, 1.0) if one.bounds and other.bounds else None
    by_seed = tuple(mine - theirs for mine, theirs in zip(*_paired(one.by_seed, other.by_seed), strict=True))
    return Linear(one.value - other.value, parts, fewer, alike, bounds, by_seed)


def _paired(one: Sequence[float], other: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Seed by seed; what was made once stands beside each seed of the other."""
    longest = max(len(one), len(other))
    return list(one) * (longest // len(one)), list(other) * (longest // len(other))


def _changed(measures: Sequence[Measure], others: Sequence[Measure], items: np.ndarray) -> np.ndarray:
    """(n,) of bool: whether an item was not measured the same, at any seed."""
    pairs = [(one, others[min(seed, len(others) - 1)]) for seed, one in enumerate(measures)]
    same = [
        np.equal(one.numerator, other.numerator) | (np.isnan(one.numerator) & np.isnan(other.numerator))
        for one, other in pairs
    ]
    weights = [one.denominator == other.denominator for one, other in pairs]
    changed: np.ndarray = ~np.logical_and.reduce([*same, *weights])[items]
    return changed


def _is_share(measure: Measure, items: np.ndarray) -> bool:
    plain = measure.combine == "ratio" and measure.transform == "none"
    return plain and bool((measure.denominator[items] == 1).all() and np.isin(measure.numerator[items], (0, 1)).all())
