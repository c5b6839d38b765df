"""A recipe's aggregates: what is made of several evaluations of a model, or of one beside a reference, with intervals.

The items of each evaluation are drawn independently of the others', and alike at every stage, so that differences are paired.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

import numpy as np

from spunge.data.items import EVERYTHING, Items
from spunge.errors import RecipeError, suggestion
from spunge.evaluation.aggregates import harmonic_mean, ks_distance, ks_pvalue, log_pvalue, relative_leak
from spunge.evaluation.evaluator import Measure
from spunge.evaluation.intervals import UNKNOWN, Interval, percentiles, reaching, student
from spunge.evaluation.statistics import drawn_weights, draws_by_seed, over_seeds, values_by_seed
from spunge.files import fingerprint
from spunge.recipe.aggregates import HarmonicMean, PrivLeak, RankTest, Term, figure_names, terms_of
from spunge.results import SMALL_SAMPLE, Group, Wanted
from spunge.run.named import judges, metrics_of, missing, unmeasured

Aggregate = HarmonicMean | RankTest | PrivLeak
AREA = "AUROC"  # what metrics that are one are called by
RISING = ("known", "good")  # what a higher value says where it is of a better model, on what is kept
RATES = (AREA, "TPR")  # of all items together: no item has a value of its own


class Sample(NamedTuple):
    """A metric on a subject's items at one stage: a measure for each seed."""

    measures: Sequence[Measure]
    items: np.ndarray
    stream: int  # of draws: the same for the same items

    @property
    def values(self) -> np.ndarray:  # (1, seeds)
        return values_by_seed(self.measures, self.items)

    @property
    def draws(self) -> np.ndarray:  # (draws, seeds)
        return draws_by_seed(self.measures, self.items, self.stream)

    @property
    def of_items(self) -> list[np.ndarray]:
        """Each item's value, for each seed: (n,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return [measure.numerator[self.items] / measure.denominator[self.items] for measure in self.measures]


class Figure(NamedTuple):
    """A number that an aggregate gives at one stage. values (1, seeds), draws (draws, seeds)."""

    metric: str
    wanted: Wanted | None
    values: np.ndarray
    draws: np.ndarray
    fewest: int  # items of the smallest sample
    n: int  # items of all
    bounds: tuple[float, float]  # that it cannot leave
    target: float | None = None  # what it should be near

    @property
    def value(self) -> float:
        return float(self.values.mean())

    @property
    def spread(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if self.values.size > 1 else None

    @property
    def interval(self) -> Interval:
        low, high = _interval(self.values, self.draws, self.fewest)
        return Interval(max(low, self.bounds[0]), min(high, self.bounds[1]))


def less(one: Figure, other: Figure) -> tuple[float, Interval]:
    """How much more one stage has than another, paired by item, and by seed where both have several."""
    with np.errstate(invalid="ignore"):  # two logs of a p-value of 0: nothing is known of how far apart they are
        values, draws = one.values - other.values, one.draws - other.draws
    return one.value - other.value, reaching(_interval(values, draws, one.fewest), 0.0, one.fewest)


def _interval(values: np.ndarray, draws: np.ndarray, count: int) -> Interval:
    """(1, seeds), (draws, seeds). Without a spread nothing is known of it."""
    seeds = values.size
    if 1 < seeds < SMALL_SAMPLE:  # of which draws would miss a share of their spread
        of_items = float(np.nanvar(draws.mean(axis=1)))
        parts = [(of_items, count), (float(np.var(values, ddof=1)) / seeds, seeds)]
        return student(float(values.mean()), parts) if sum(part for part, _ in parts) > 0 else UNKNOWN
    drawn = over_seeds(draws)
    known = drawn[~np.isnan(drawn)]
    return percentiles(known, count) if len(known) and np.ptp(known) > 0 else UNKNOWN


def figures(
    name: str, aggregate: Aggregate, samples: Mapping[str, Sequence[Sample | None]], stage: str
) -> Iterator[Figure]:
    """What an aggregate gives at a stage; nothing where the stage was not judged for it, or is the reference itself.

    samples: stage -> the sample of each term.
    """
    mine = [sample for sample in samples[stage] if sample is not None]
    if len(mine) < len(samples[stage]):
        return
    count, n = min(len(sample.items) for sample in mine), sum({each.stream: len(each.items) for each in mine}.values())
    if isinstance(aggregate, HarmonicMean):
        value, draws = (
            harmonic_mean([sample.values for sample in mine]),
            harmonic_mean([sample.draws for sample in mine]),
        )
        yield Figure(name, "up", value, draws, count, n, (0.0, 1.0))
        return
    reference = samples[aggregate.against][0] if aggregate.against in samples else None
    if reference is None or stage == aggregate.against:
        return
    if isinstance(aggregate, PrivLeak):
        areas = [mine[0].values, reference.values, mine[0].draws, reference.draws]
        own, other, drawn, beside = areas if aggregate.area == "members" else [1 - area for area in areas]
        few = int(
            min(mine[0].measures[0].denominator[mine[0].items].sum(), (mine[0].measures[0].denominator == 0).sum())
        )
        yield Figure(name, "near", relative_leak(own, other), relative_leak(drawn, beside), few, n, (-100.0, inf), 0.0)
        return
    distances, pvalues = (
        np.stack(each, axis=1) for each in zip(*_tests(mine[0], reference, observed=True), strict=True)
    )
    drawn, of_draws = (np.stack(each, axis=1) for each in zip(*_tests(mine[0], reference, observed=False), strict=True))
    plain, log, distance = figure_names(name, aggregate)
    yield Figure(plain, "up", pvalues, of_draws, count, n, (0.0, 1.0))
    yield Figure(log, "up", log_pvalue(pvalues), log_pvalue(of_draws), count, n, (-inf, 0.0))
    yield Figure(distance, "down", distances, drawn, count, n, (0.0, 1.0))


def _tests(sample: Sample, reference: Sample, observed: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each seed, distances from the reference and their p-values: of the items as they are, (1,), or drawn, (draws,)."""
    [theirs] = reference.of_items
    for own in sample.of_items:
        known = np.isfinite(own) & np.isfinite(theirs)
        count = int(known.sum())
        weights = iter([np.ones((1, count))]) if observed else drawn_weights(count, sample.stream)
        distances = np.concatenate([ks_distance(own[known], theirs[known], each) for each in weights])
        yield distances, np.array([ks_pvalue(distance, count) for distance in distances])


def refuse_measures(name: str, aggregate: Aggregate, samples: Sequence[Sample | None]) -> None:
    """Raises RecipeError for measures that turn out to be of another kind than an aggregate needs."""
    for sample in samples:
        first = None if sample is None else sample.measures[0]
        if first is None:
            continue
        wrong = first.combine != ("auroc" if isinstance(aggregate, PrivLeak) else "ratio")
        if wrong or (isinstance(aggregate, HarmonicMean) and (first.higher not in RISING or first.transform != "none")):
            raise RecipeError(
                f"aggregates.{name}: {aggregate.kind} can't be made of {first.metric!r}; name another metric (nothing is judged "
                "again)"
            )


def refuse_nothing(
    name: str, aggregate: Aggregate, measured: Mapping[str, Sequence[tuple[str, str]]], terms: Sequence[bool]
) -> None:
    """Raises RecipeError for a term that no stage gave, once all have measured. measured: of each evaluation that did, the metrics
    and subjects that it gave; terms: whether some stage gave each term."""
    for term, given in zip(terms_of(aggregate), terms, strict=True):
        pairs = measured.get(term.evaluation, ())
        if given or not pairs:
            continue
        subjects = list(dict.fromkeys(subject for metric, subject in pairs if metric == term.metric))
        why = missing("measured no", term.metric, dict.fromkeys(metric for metric, _ in pairs), "measured")
        if subjects:
            why = missing("has no subject", term.subject or EVERYTHING, subjects, "has")
        raise RecipeError(f"aggregates.{name}: evaluation {term.evaluation!r} {why} (nothing is judged again)")


def sample_of(
    term: Term, items: Items, metrics: Sequence[tuple[str, Mapping[str, np.ndarray], Sequence[Measure]]]
) -> Sample | None:
    """The term's measures among those of one stage: metric, its subjects and its measures. None where it was not judged."""
    subject = subject_of(term, items)
    for metric, subjects, measures in metrics:
        if metric == term.metric and subject in subjects:
            return Sample(measures, subjects[subject], int(fingerprint([items.name, subject])[:12], 16))
    return None


def subject_of(term: Term, items: Items) -> str:
    """The subject that a term names, or means."""
    if term.subject is not None:
        return term.subject
    return items.overall or (next(iter(items.subjects)) if len(items.subjects) == 1 else EVERYTHING)


def group_of(aggregate: Aggregate) -> Group:
    return "keep" if isinstance(aggregate, HarmonicMean) else "forget"


def refuse_aggregates(aggregates: Mapping[str, Aggregate], evaluations: Sequence[Items], stages: Sequence[str]) -> None:
    """Raises RecipeError for a metric or a subject that an evaluation will not give, and for an aggregate that no stage is judged
    for, before anything is trained."""
    by_name = {items.name: items for items in evaluations}
    for name, aggregate in aggregates.items():
        for term in terms_of(aggregate):
            items = by_name[term.evaluation]
            _refuse_metric(f"aggregates.{name}", aggregate, term, items)
            refuse_subject(f"aggregates.{name}", term, items)
            if not isinstance(aggregate, HarmonicMean) and not judges(items.settings, aggregate.against):
                raise RecipeError(
                    f"aggregates.{name}.against: evaluation {term.evaluation!r} does not judge {aggregate.against!r}; add that to "
                    "its stages"
                )
        judging = [by_name[term.evaluation] for term in terms_of(aggregate)]
        judged = [stage for stage in stages if all(judges(items.settings, stage) for items in judging)]
        if not set(judged) - (set() if isinstance(aggregate, HarmonicMean) else {aggregate.against}):
            names = ", ".join(dict.fromkeys(items.name for items in judging))
            raise RecipeError(
                f"aggregates.{name}: no stage is judged by all that it is made of ({names}), and it would give nothing; add one to "
                "their stages"
            )


def _refuse_metric(setting: str, aggregate: Aggregate, term: Term, items: Items) -> None:
    if why := unmeasured(term.metric, items):
        raise RecipeError(f"{setting}: evaluation {term.evaluation!r} {why}")
    known = metrics_of(items)
    if isinstance(aggregate, PrivLeak) != (AREA in term.metric) or any(
        rate in term.metric for rate in RATES if not isinstance(aggregate, PrivLeak)
    ):
        wants = f"an {AREA}" if isinstance(aggregate, PrivLeak) else "a metric that every item has a value of"
        raise RecipeError(f"{setting}: {aggregate.kind} needs {wants}, and {term.metric!r} is none")
    if isinstance(aggregate, HarmonicMean) and known is not None and known[term.metric] not in RISING:
        raise RecipeError(
            f"{setting}: harmonic_mean needs shares that are higher in a better model, and {term.metric!r} is not; name another"
        )


def refuse_subject(setting: str, term: Term, items: Items) -> None:
    """Raises RecipeError for a subject that an evaluation will not give."""
    if not items.subjects:  # the evaluator brings items of its own, and names them when it measures
        if term.subject is None:
            raise RecipeError(f"{setting}: evaluation {term.evaluation!r} names its subjects itself; give subject")
        return
    subject = subject_of(term, items)
    if subject in items.subjects:
        return
    there = f"it has {', '.join(items.subjects)}"
    if term.subject is None:
        raise RecipeError(f"{setting}: evaluation {term.evaluation!r} has several subjects; give subject: {there}")
    raise RecipeError(
        f"{setting}: evaluation {term.evaluation!r} has no subject {subject!r}{suggestion(subject, items.subjects)}; {there}"
    )
