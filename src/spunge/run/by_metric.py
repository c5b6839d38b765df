"""What the evaluations of a run measured, by stage and metric: a measure for each seed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spunge.data.items import EVERYTHING, Items
from spunge.evaluation.evaluator import Measure, Rated


class Judged(NamedTuple):
    """An evaluation: its items, and what measured them beyond its settings (None where nothing did)."""

    items: Items
    instrument: Mapping[str, Any] | None
    rated: Sequence[Rated] = ()  # a scorer's scores of every model


class Measured(NamedTuple):
    """One metric of one evaluation at one stage: a measure for each seed (of the base, one for all)."""

    items: Items
    measures: list[Measure]

    @property
    def subjects(self) -> dict[str, np.ndarray]:
        """Subject -> its items."""
        first = self.measures[0]
        if first.subject is not None:
            return {first.subject: np.arange(len(first.numerator))}
        return dict(self.items.subjects)

    @property
    def overall(self) -> str | None:
        """The subject that holds all rows."""
        return self.items.overall if self.measures[0].subject is None else EVERYTHING


MetricKey = tuple[str, str, str]  # evaluation, metric, the measure's own subject or nothing
Stored = Mapping[str, Sequence[Measure]]  # evaluation -> its measures, of one stage and seed


def measured(evaluations: Sequence[Items], seeds: Sequence[Stored]) -> dict[MetricKey, Measured]:
    """What the evaluations gave at one stage, seed by seed."""
    metrics: dict[MetricKey, Measured] = {}
    for stored in seeds:
        for items in evaluations:
            for measure in stored.get(items.name, ()):
                key = (items.name, measure.metric, measure.subject or "")
                metrics.setdefault(key, Measured(items, [])).measures.append(measure)
    return metrics
