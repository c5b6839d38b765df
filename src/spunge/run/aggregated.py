"""Aggregates as results: rows, differences and what they were made of."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, isnan
from typing import NamedTuple

from spunge.data.items import EVERYTHING
from spunge.files import fingerprint
from spunge.recipe.aggregates import terms_of
from spunge.results import Difference, Evaluation, Row
from spunge.run.aggregates import (
    Aggregate,
    Figure,
    Sample,
    figures,
    group_of,
    less,
    refuse_measures,
    refuse_nothing,
    sample_of,
)
from spunge.run.by_metric import Judged, Measured, MetricKey


class Aggregated(NamedTuple):
    """What results.json says of one aggregate."""

    rows: list[Row]
    differences: list[Difference]
    evaluation: Evaluation


def aggregated(
    name: str,
    aggregate: Aggregate,
    evaluations: Sequence[Judged],
    stages: Mapping[str, Mapping[MetricKey, Measured]],
    pairs: Sequence[tuple[str, str]],
) -> Aggregated:
    """One of the recipe's aggregates, at every stage that was judged for it. `pairs`: stages that are compared."""
    made = _figures(name, aggregate, evaluations, stages)
    rows = [_row(name, aggregate, stage, figure) for stage, each in made.items() for figure in each]
    return Aggregated(rows, list(_differences(made, pairs)), _described(name, aggregate, evaluations, made))


def _figures(
    name: str,
    aggregate: Aggregate,
    evaluations: Sequence[Judged],
    stages: Mapping[str, Mapping[MetricKey, Measured]],
) -> dict[str, list[Figure]]:
    """Stage -> what the aggregate gives there."""
    items_of = {each.items.name: each.items for each in evaluations}
    samples: dict[str, list[Sample | None]] = {}
    for stage, metrics in stages.items():
        samples[stage] = []
        for term in terms_of(aggregate):
            own = [(key[1], each.subjects, each.measures) for key, each in metrics.items() if key[0] == term.evaluation]
            samples[stage].append(sample_of(term, items_of[term.evaluation], own))
        refuse_measures(name, aggregate, samples[stage])
    refuse_nothing(name, aggregate, *_given(aggregate, stages, samples))
    return {stage: list(figures(name, aggregate, samples, stage)) for stage in stages}


def _given(
    aggregate: Aggregate,
    stages: Mapping[str, Mapping[MetricKey, Measured]],
    samples: Mapping[str, Sequence[Sample | None]],
) -> tuple[dict[str, list[tuple[str, str]]], list[bool]]:
    """Of each evaluation that measured, the metrics and subjects that it gave; and whether some stage gave each term."""
    measured: dict[str, list[tuple[str, str]]] = {}
    for metrics in stages.values():
        for (evaluation, metric, _), each in metrics.items():
            measured.setdefault(evaluation, []).extend((metric, subject) for subject in each.subjects)
    count = len(terms_of(aggregate))
    return measured, [any(each[term] is not None for each in samples.values()) for term in range(count)]


def _row(name: str, aggregate: Aggregate, stage: str, figure: Figure) -> Row:
    low, high = figure.interval
    return Row(
        stage=stage,
        subject=EVERYTHING,
        metric=figure.metric,
        value=figure.value,
        low=None if isnan(low) else low,
        high=None if isnan(high) else high,
        n=figure.n,
        wanted=figure.wanted,
        target=figure.target,
        spread=figure.spread,
        evaluation=name,
        group=group_of(aggregate),
    )


def _differences(made: Mapping[str, Sequence[Figure]], pairs: Sequence[tuple[str, str]]) -> Iterator[Difference]:
    for stage, against in pairs:
        # Where one of the two has none, such as the reference of a test, there is nothing to pair.
        for one, other in zip(made[stage], made[against], strict=False):
            value, (low, high) = less(one, other)
            yield Difference(
                stage=stage,
                against=against,
                subject=EVERYTHING,
                metric=one.metric,
                kind="difference",
                value=value,
                low=None if isnan(low) else low,
                high=None if isnan(high) else high,
                n=one.n,
                wanted=one.wanted,
                target=one.target,
            )


def _described(
    name: str, aggregate: Aggregate, evaluations: Sequence[Judged], made: Mapping[str, Sequence[Figure]]
) -> Evaluation:
    """With the instruments and the items of all evaluations that it is made of."""
    used = {term.evaluation for term in terms_of(aggregate)}
    judged = {each.items.name: each for each in evaluations if each.items.name in used}
    instruments = {each: told.instrument for each, told in judged.items() if told.instrument}
    without = [stage for stage, each in made.items() if not all(isfinite(figure.value) for figure in each)]
    return Evaluation(
        name=name,
        kind=aggregate.kind,
        metrics=tuple(dict.fromkeys(figure.metric for each in made.values() for figure in each)),
        rows=fingerprint([[each, told.items.sha256] for each, told in judged.items()])[:12],
        settings=aggregate.model_dump(mode="json", exclude={"kind"}),
        instrument=instruments or None,
        remarks=(f"It has no value at {', '.join(without)}: what it is made of has none there.",) if without else (),
    )
