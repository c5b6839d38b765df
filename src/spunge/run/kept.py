"""What scales are calibrated by: a metric of an evaluation on a subject, or a harmonic mean over several, on items of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spunge.data.items import EVERYTHING, Items
from spunge.errors import RecipeError
from spunge.evaluation.aggregates import harmonic_mean
from spunge.evaluation.evaluator import Measure
from spunge.evaluation.statistics import score
from spunge.files import fingerprint
from spunge.recipe.aggregates import HarmonicMean
from spunge.results import Wanted, wanted
from spunge.run.aggregates import refuse_measures, refuse_subject, sample_of, subject_of
from spunge.run.groups import what_is
from spunge.run.inputs import BaseInputs
from spunge.run.judge import measured_by
from spunge.run.named import metrics_of, unmeasured

Measured = Callable[[Items], Sequence[Measure]]


class Kept(NamedTuple):
    """A figure of what must be kept. mean: of several evaluations; None: of the only one."""

    items: tuple[Items, ...]  # of each evaluation
    name: str  # of the evaluation, or of the aggregate
    metric: str
    subject: str
    mean: HarmonicMean | None = None

    @property
    def subjects(self) -> dict[str, tuple[Items, str]]:
        """What it is measured on: an evaluation's items, and which of its subjects."""
        if self.mean is None:
            pairs = [(self.items[0], self.subject)]
        else:
            by_name = {items.name: items for items in self.items}
            pairs = [(by_name[term.evaluation], subject_of(term, by_name[term.evaluation])) for term in self.mean.of]
        return {f"{subject} of {items.name}": (items, subject) for items, subject in pairs}

    @property
    def n(self) -> int:
        """Items that it is measured on."""
        return sum(len(items.subjects[subject]) for items, subject in self.subjects.values())

    @property
    def members(self) -> dict[str, list[int]]:
        """Of subjects that are not all of an evaluation's items, which they are: the items' fingerprint does not tell."""
        own = {name: items.subjects[subject].tolist() for name, (items, subject) in self.subjects.items()}
        return {name: chosen for name, chosen in own.items() if len(chosen) < self.subjects[name][0].table.num_rows}

    @property
    def rows(self) -> str:
        """Fingerprint of the items."""
        if self.mean is None:
            return self.items[0].sha256[:12]
        return fingerprint([[items.name, items.sha256] for items in self.items])[:12]


def kept_of(base: BaseInputs) -> Kept | None:
    """What the recipe calibrates by; None where it does not."""
    settings, items = base.recipe.calibrate, base.calibration_items
    if settings is None:
        return None
    if settings.aggregate is not None:
        mean = base.recipe.aggregates[settings.aggregate]
        assert isinstance(mean, HarmonicMean)
        return Kept(items, settings.aggregate, settings.aggregate, EVERYTHING, mean)
    subject = settings.subject or items[0].overall or next(iter(items[0].subjects))
    return Kept(items, items[0].name, str(settings.metric), subject)


def refuse_kept(base: BaseInputs, parts: set[str]) -> None:
    """Raises RecipeError for a metric that an evaluation will not measure, of which no share can be kept, or on what is to be
    forgotten, all or in part. parts: the values to forget. The terms of a mean are refused as any aggregate's are."""
    kept = kept_of(base)
    if kept is None:
        return
    if kept.mean is not None:
        by_name = {items.name: items for items in kept.items}
        for term in kept.mean.of:
            refuse_subject(f"aggregates.{kept.name}", term, by_name[term.evaluation])
    for items, subject in kept.subjects.values():
        _, forget = what_is(subject, items.subjects, items, items.settings, parts)
        if forget is not False or items.share_forgotten(subject) == "all":
            setting = "calibrate.subject" if kept.mean is None else "calibrate.aggregate"
            raise RecipeError(
                f"{setting}: {subject!r} of {items.name!r} is to be forgotten, all or in part; name what must be kept"
            )
    if kept.mean is not None:
        return
    [items] = kept.items
    if why := unmeasured(kept.metric, items):
        raise RecipeError(f"calibrate.metric: the evaluation {items.name!r} {why}")
    known = metrics_of(items)
    if known is not None and wanted(known[kept.metric], False) is None:
        raise RecipeError(
            f"calibrate.metric: {kept.metric!r}: which way is good is not known of it; name another metric"
        )


class Figure(NamedTuple):
    value: float
    wanted: Wanted | None


def figure_of(kept: Kept, measured: Measured) -> Figure:
    """The figure of a model. measured: gives an evaluation's measures of it. Raises RecipeError for a metric that is not there."""
    measures: Mapping[str, Sequence[Measure]] = {items.name: measured(items) for items in kept.items}
    if kept.mean is None:
        [items] = kept.items
        measure = measured_by(measures[items.name], kept.metric, items, "calibrate")
        way = None if measure.target is not None else wanted(measure.higher, False)
        return Figure(score([measure], items.subjects[kept.subject]).value, way)
    by_name = {items.name: items for items in kept.items}
    samples = []
    for term in kept.mean.of:
        items = by_name[term.evaluation]
        measure = measured_by(measures[items.name], term.metric, items, "calibrate")
        samples.append(sample_of(term, items, [(measure.metric, items.subjects, [measure])]))
    refuse_measures(kept.name, kept.mean, samples)
    shares = [sample.values for sample in samples if sample is not None]
    return Figure(float(np.squeeze(harmonic_mean(shares))), "up")
