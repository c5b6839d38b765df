"""Measures become results: scores with their intervals, paired differences, and what comes back after attacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from types import MappingProxyType
from typing import Any

import numpy as np

from spunge.data.items import EVERYTHING
from spunge.errors import RecipeError
from spunge.evaluation import statistics
from spunge.evaluation.evaluator import Rated
from spunge.evaluation.statistics import Recovery, Score, difference, recovery, score, worst
from spunge.recipe.evaluating import ITEM_SETTINGS, measured_again
from spunge.results import UNTAUGHT, Difference, Evaluation, Group, Model, Recovered, Row, Wanted
from spunge.run.aggregated import aggregated
from spunge.run.aggregates import Aggregate
from spunge.run.by_metric import Judged, Measured, MetricKey, Stored, measured
from spunge.run.groups import Direction, Directions, directions_of
from spunge.run.named import WORST

NONE: Mapping[str, Aggregate] = MappingProxyType({})
WORST_KNOWN: dict[Group, str] = {"forget": "least forgotten", "keep": "least kept"}  # where good depends on the rows


@dataclass(frozen=True)
class Scored:
    """What results.json says of the measures."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    recovered: tuple[Recovered, ...]
    evaluations: tuple[Evaluation, ...]


def scored(
    evaluations: Sequence[Judged],
    models: Sequence[Model],
    seeds: Sequence[Mapping[str, Stored]],
    parts: Sequence[str],
    aggregates: Mapping[str, Aggregate] = NONE,
) -> Scored:
    """All that the measures say.

    evaluations and models: in the order of the results. seeds: for each seed, stage -> the measures that its evaluations
    gave; the base stands in the first alone. parts: the values to forget; none where the recipe splits by nothing.
    aggregates: the recipe's, by name.
    Raises RecipeError where two evaluations report one metric on one subject.
    """
    every = [each.items for each in evaluations]
    stages = {model.stage: measured(every, [seed.get(model.stage, {}) for seed in seeds]) for model in models}
    directions = directions_of(every, list(stages.values()), set(parts))
    rows = [row for stage, metrics in stages.items() for row in _rows(stage, metrics, directions)]
    pairs = list(compared(models))
    compared_rows = [row for stage, against in pairs for row in differences(stage, against, stages, directions)]
    described = [_described(each, list(stages.values()), set(parts)) for each in evaluations]
    for name, aggregate in aggregates.items():
        made = aggregated(name, aggregate, evaluations, stages, pairs)
        rows += made.rows
        compared_rows += made.differences
        described.append(made.evaluation)
    _refuse_twice(rows)
    return Scored(
        rows=tuple(rows),
        differences=tuple(compared_rows),
        recovered=tuple(row for stage, against in pairs if against == "base" for row in _recovered(stage, stages)),
        evaluations=tuple(described),
    )


def compared(models: Sequence[Model]) -> Iterator[tuple[str, str]]:
    """The stages of which one is compared with the other, paired by item."""
    for model in models:
        if model.stage == UNTAUGHT:
            yield "base", UNTAUGHT
        elif model.kind != "base":
            yield model.stage, "base"
    if any(model.kind == "merged" for model in models):
        for kind in ("control", "reference", "model"):
            yield from (("merged", model.stage) for model in models if model.kind == kind and model.stage != UNTAUGHT)


def _rows(stage: str, metrics: Mapping[MetricKey, Measured], directions: Directions) -> Iterator[Row]:
    for key, each in metrics.items():
        first = each.measures[0]
        told = ("of", "side", "attack", "label", "curve", "at", "unit")
        facts = {"stage": stage, "evaluation": key[0]} | {name: vars(first)[name] for name in told}
        for subject, members in each.subjects.items():
            about = directions[key, subject]._asdict()
            yield Row(subject=subject, **about, **_told(score(each.measures, members)), **facts)
        for name, way, subjects in _worst(each, {subject: directions[key, subject] for subject in each.subjects}):
            whole = each.overall or EVERYTHING
            named = name if whole == EVERYTHING else f"{name} of {whole}"
            values = _told(worst(each.measures, subjects, highest=way == "down"))
            yield Row(subject=named, group="worst", worst_of=whole, wanted=way, **values, **facts)


def _worst(each: Measured, directions: Mapping[str, Direction]) -> Iterator[tuple[str, Wanted, dict[str, np.ndarray]]]:
    """A name, the good way and the subjects that the worst is chosen from: from all, where the good way is the same on all; else
    from those to forget and from those to keep apart."""
    first = each.measures[0]
    others = {subject: members for subject, members in each.subjects.items() if subject != each.overall}
    if first.higher in ("good", "bad"):
        chosen = {WORST: others}
    else:
        chosen = {
            name: {subject: members for subject, members in others.items() if directions[subject].group == group}
            for group, name in WORST_KNOWN.items()
        }
    for name, subjects in chosen.items():
        way = directions[next(iter(subjects))].wanted if subjects else None
        if first.worst and len(subjects) > 1 and way in ("up", "down"):
            yield name, way, subjects


def _told(scored: Score | statistics.Difference | Recovery) -> dict[str, Any]:
    """As fields of a row, without an interval that could not be had."""
    return {name: value for name, value in scored._asdict().items() if name not in ("low", "high") or not isnan(value)}


def _refuse_twice(rows: Sequence[Row]) -> None:
    seen = set()
    for row in rows:
        key = (row.stage, row.subject, row.metric)
        if key in seen:
            raise RecipeError(
                f"evaluate.subject: two evaluations report {row.metric!r} on {row.subject!r}; give one of them a "
                "subject of its own (nothing is judged again then)"
            )
        seen.add(key)


def differences(
    stage: str, against: str, stages: Mapping[str, Mapping[MetricKey, Measured]], directions: Directions
) -> Iterator[Difference]:
    """One stage against another by every metric that both were measured by, paired by item."""
    for key, each in stages[stage].items():
        other = stages[against].get(key)
        if other is None:
            continue
        for subject, members in each.subjects.items():
            values = difference(each.measures, other.measures, members)
            way = directions[key, subject]._asdict()
            del way["group"]
            yield Difference(stage=stage, against=against, subject=subject, **way, **_told(values))


def _recovered(stage: str, stages: Mapping[str, Mapping[MetricKey, Measured]]) -> Iterator[Recovered]:
    """How much of what was forgotten an attack brings back, by subject."""
    for each in stages[stage].values():
        attacked = each.measures[0]
        key = (measured_again(each.items.settings) or "", attacked.of or "", attacked.subject or "")
        before, after = stages["base"].get(key), stages[stage].get(key)
        if attacked.of is None or before is None or after is None:
            continue
        for subject, members in each.subjects.items():
            share = recovery(before.measures, after.measures, each.measures, members)
            if share is not None:
                metric, of = attacked.metric, attacked.of
                yield Recovered(stage=stage, subject=subject, metric=metric, of=of, **_told(share))


def _described(judged: Judged, stages: Sequence[Mapping[MetricKey, Measured]], parts: set[str]) -> Evaluation:
    items = judged.items
    metrics = dict.fromkeys(metric for judged_there in stages for name, metric, _ in judged_there if name == items.name)
    others = items.subjects.keys() - {items.overall}
    return Evaluation(
        name=items.name,
        kind=items.settings.kind,
        metrics=tuple(metrics),
        overall=items.overall if others & parts else None,
        rows=items.sha256[:12],
        # The settings that name columns are called like the roles, which the items' columns are called.
        settings=items.settings.model_dump(mode="json", exclude={"kind", *ITEM_SETTINGS, *items.table.column_names}),
        instrument=judged.instrument,
        remarks=one_sided(judged.rated),
    )


def one_sided(rated: Sequence[Rated]) -> tuple[str, ...]:
    """That a scorer said the same of every text of every model, if it did."""
    above = [each.least >= each.threshold for each in rated]
    below = [each.greatest < each.threshold for each in rated]
    if not rated or not (all(above) or all(below)):
        return ()
    least, greatest = min(each.least for each in rated), max(each.greatest for each in rated)
    return (
        f"All {sum(each.count for each in rated)} scores lie {'at or above' if all(above) else 'below'} the threshold "
        f"{rated[0].threshold:g} ({least:.3g} to {greatest:.3g}), whichever model wrote the text: the scorer may not tell such "
        "texts apart. Read some of them, or choose another scorer or threshold.",
    )
