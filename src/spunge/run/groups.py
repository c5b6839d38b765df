"""What the subjects of an evaluation are, to forget, to be kept or both, and which way a metric is good on them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spunge.data.items import EVERYTHING, Items
from spunge.errors import RecipeError
from spunge.recipe.evaluating import EvaluatorSettings, measured_again
from spunge.registry import EVALUATORS
from spunge.results import Group, Wanted, wanted
from spunge.run.by_metric import Measured, MetricKey


class Direction(NamedTuple):
    """What a subject is, and which way a metric is good on it. target: what it should be near, where that is what is wanted."""

    group: Group
    wanted: Wanted | None
    target: float | None = None


Directions = Mapping[tuple[MetricKey, str], Direction]  # by metric and subject


def directions_of(
    evaluations: Sequence[Items], stages: Sequence[Mapping[MetricKey, Measured]], parts: set[str]
) -> dict[tuple[MetricKey, str], Direction]:
    """What every subject is, by what the recipe says of its evaluation, by the evaluation's other subjects and the parts."""
    settings_of = {items.name: items.settings for items in evaluations}
    metrics = {key: each for metrics in stages for key, each in metrics.items()}
    together: dict[tuple[str, str], set[str]] = {}  # an evaluation's subjects, which measures may be of one each
    for (evaluation, metric, _), each in metrics.items():
        together.setdefault((evaluation, metric), set()).update(each.subjects)
    directions = {}
    for key, each in metrics.items():
        evaluation, metric, _ = key
        settings = settings_of[
            measured_again(each.items.settings) or evaluation
        ]  # an attack's rows are those it attacks
        for subject in each.subjects:
            group = settings.group or _group(subject, together[evaluation, metric], each, parts)
            forget = {"forget": True, "keep": False}.get(group)
            if group == "together" and _all_to_forget(each, settings, parts):
                forget = True
            first = each.measures[0]
            way = "near" if first.target is not None else wanted(first.higher, forget)
            directions[key, subject] = Direction(group, way, first.target)
    return directions


def _group(subject: str, subjects: set[str], each: Measured, parts: set[str]) -> Group:
    """What a subject is, by the other subjects of its evaluation, its source and the values to forget."""
    if subject in parts:
        return "forget"
    share = each.items.share_forgotten(subject) if each.measures[0].subject is None else None
    # Other rows, such as held-out ones, may be about what is to be forgotten: without a split those that were given no name.
    unnamed = not parts and subject == EVERYTHING
    if subject == each.overall and (subjects & parts or share in ("all", "some") or unnamed):
        return "together"
    return "forget" if share == "all" else "keep"


def _all_to_forget(each: Measured, settings: EvaluatorSettings, parts: set[str]) -> bool:
    """Whether all rows together are rows to forget."""
    if each.measures[0].subject is not None:  # an attack that measures the samples themselves measures no others
        return EVALUATORS.get(settings.kind).uses_samples
    whole = each.subjects[str(each.overall)]
    members = [items for subject, items in each.subjects.items() if subject in parts]
    to_forget = np.isin(whole, np.concatenate(members)) if members else np.zeros(len(whole), dtype=bool)
    return bool((to_forget | (each.items.forgotten[whole] if each.items.forgotten is not None else False)).all())


def refuse_mixed(evaluations: Sequence[Items], parts: set[str]) -> Iterator[str]:
    """Remarks on all rows together that are to forget and to be kept, some of each. Raises RecipeError for another such subject:
    neither way would be good of it, and it would be taken for one to be kept."""
    for items in evaluations:
        if items.settings.group is not None or measured_again(items.settings) is not None:
            continue
        for subject, own in items.subjects.items():
            if subject in parts or items.share_forgotten(subject) != "some":
                continue
            lost = int(items.forgotten[own].sum()) if items.forgotten is not None else 0
            where = f"evaluate: {lost} of the {len(own)} rows of {subject!r} in {items.name!r}"
            mixed = f"{where} are rows to forget, and the rest are not"
            if subject != items.overall:
                raise RecipeError(f"{mixed}; part them by a where or by, or say by group what they are taken for")
            if not parts & items.subjects.keys():
                yield f"{mixed}: no way is good on them together; part them by a where or by, or give group"
