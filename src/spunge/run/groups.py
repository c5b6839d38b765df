"""What the subjects of an evaluation are, to forget, to be kept or both, and which way a metric is good on them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spunge.data.items import EVERYTHING, Items
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Measure
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
        first = each.measures[0]
        for subject in each.subjects:
            others = together[evaluation, metric]
            if first.subject is None:
                group, forget = what_is(subject, others, each.items, settings, parts)
            else:  # an attack that measures the samples themselves measures no others
                group = settings.group or _group(subject, others, each.overall, None, parts)
                forget = _to_forget(group, EVALUATORS.get(settings.kind).uses_samples)
            directions[key, subject] = Direction(group, way_of(first, forget), first.target)
    return directions


def way_of(measure: Measure, forget: bool | None) -> Wanted | None:
    """Which way a measure is good. forget: whether its items are to be forgotten or kept; None: some of either."""
    return "near" if measure.target is not None else wanted(measure.higher, forget)


def what_is(
    subject: str, subjects: Collection[str], items: Items, settings: EvaluatorSettings, parts: Collection[str]
) -> tuple[Group, bool | None]:
    """What a subject of an evaluation's own items is, and whether it is to be forgotten; None: some of it is.

    subjects: those that are measured together; settings: of the evaluation whose items they are.
    """
    share = items.share_forgotten(subject)
    group = settings.group or _group(subject, subjects, items.overall, share, parts)
    return group, _to_forget(group, group == "together" and _all_to_forget(items, parts))


def _group(
    subject: str, subjects: Collection[str], overall: str | None, share: str | None, parts: Collection[str]
) -> Group:
    """What a subject is, by the other subjects, the values to forget and how many of its items are rows to forget."""
    if subject in parts:
        return "forget"
    # Other rows, such as held-out ones, may be about what is to be forgotten: without a split those that were given no name.
    unnamed = not parts and subject == EVERYTHING
    if subject == overall and (set(subjects) & set(parts) or share in ("all", "some") or unnamed):
        return "together"
    return "forget" if share == "all" else "keep"


def _to_forget(group: Group, all_of_them: bool) -> bool | None:
    """Whether a group is to be forgotten (True) or kept; None: some of either. all_of_them: of all rows together."""
    if group == "together":
        return True if all_of_them else None
    return {"forget": True, "keep": False}.get(group)


def _all_to_forget(items: Items, parts: Collection[str]) -> bool:
    """Whether all rows together are rows to forget."""
    whole = items.subjects[str(items.overall)]
    members = [own for subject, own in items.subjects.items() if subject in parts]
    to_forget = np.isin(whole, np.concatenate(members)) if members else np.zeros(len(whole), dtype=bool)
    return bool((to_forget | (items.forgotten[whole] if items.forgotten is not None else False)).all())


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
