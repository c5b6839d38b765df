"""What results.json says, arranged for showing: metrics, each with its subjects in groups, and a row per model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from spunge.report.wording import name, number, signed
from spunge.results import (
    FEWEST_CERTAIN,
    SMALL_SAMPLE,
    Difference,
    Group,
    Kind,
    Model,
    Published,
    Recovered,
    Results,
    Row,
    Wanted,
    Watched,
)

GROUPS: dict[Group, str] = {
    "forget": "Parts to forget",
    "together": "All rows together",
    "keep": "To be kept",
    "worst": "Worst subject",
}
PLACES: dict[Group, str] = {
    "forget": "what is to be forgotten",
    "together": "all rows together",
    "keep": "what is to be kept",
    "worst": "the worst subject",
}
LISTED = 6  # names in a sentence
LOWER: dict[Wanted | None, str] = {"down": "lower", "up": "higher", None: ""}


def way_of(wanted: Wanted | None, target: float | None) -> str:
    """`lower`, `higher` or `near 0.5`; nothing where no way is good."""
    return f"near {target:g}" if wanted == "near" and target is not None else LOWER.get(wanted, "")


class Interval(NamedTuple):
    low: float
    high: float


def interval(row: Row | Difference | Recovered) -> Interval | None:
    """The 95% interval, where it is known."""
    if row.low is None or row.high is None or math.isnan(row.low) or math.isnan(row.high):
        return None
    return Interval(row.low, row.high)


def share_back(row: Recovered) -> str:
    """`62% [40% 81%]`."""
    ends = " ".join(f"{100 * end:.0f}%" for end in interval(row) or ())
    return f"{100 * row.value:.0f}%{f' [{ends}]' if ends else ''}".replace("-", "−")


class Shift(NamedTuple):
    """How far one model lies from another on a subject: a difference, or a ratio. Without an interval it claims nothing."""

    value: float
    interval: Interval | None
    ratio: bool
    n: int | None = None
    changed: int | None = None  # items that were not measured the same

    @property
    def way(self) -> int:
        """1 rose, -1 fell, each for certain; else 0."""
        # One item drawn again and again has no spread, which proves nothing.
        if self.interval is None or self.n == 1:
            return 0
        same = 1.0 if self.ratio else 0.0
        return (self.interval.low > same) - (self.interval.high < same)

    def times(self, end: float) -> str:
        """The ratio, or an end of its interval, to the digits that tell it from 1."""
        if abs(self.value - 1) < 0.1:
            return number(end, True, 3)
        return number(end, 0.1 <= end < 100)


class Subject(NamedTuple):
    name: str
    group: Group
    branch: str | None = None  # the stage whose model unlearned this subject
    wanted: Wanted | None = None  # which way of the metric is good on it
    target: float | None = None  # what it should be near, where that is what is wanted

    @property
    def way(self) -> str:
        return way_of(self.wanted, self.target)

    def worse(self, before: float, after: float) -> float:
        """How much further from the target one value is than another."""
        target = self.target or 0.0
        return abs(after - target) - abs(before - target)


@dataclass(frozen=True)
class Metric:
    name: str
    subjects: tuple[Subject, ...]  # parts to forget first, the worst last
    rows: Mapping[tuple[str, str], Row]  # (stage, subject)
    paired: Mapping[tuple[str, str, str], Shift] = field(default_factory=dict)  # (stage, against, subject)
    of: str | None = None  # the metric that this one measures again, under an attack
    curve: str | None = None  # what all points of its curve are called together
    at: float | None = None  # where on the curve
    unit: str | None = None  # of `at`
    chance: float | None = None  # what guessing gives
    side: bool = False  # a check on another metric

    def row(self, stage: str, subject: str) -> Row | None:
        return self.rows.get((stage, subject))

    def judged(self, models: Iterable[Model]) -> list[Model]:
        """Those of the models that have a score."""
        known = {stage for stage, _ in self.rows}
        return [model for model in models if model.stage in known]

    def shift(self, stage: str, against: str, subject: str) -> Shift | None:
        """The paired one; where there is none the plain one, which claims nothing; None where a row is missing."""
        paired = self.paired.get((stage, against, subject))
        if paired is not None:
            return paired
        after, before = self.row(stage, subject), self.row(against, subject)
        if before is None or after is None or not (math.isfinite(before.value) and math.isfinite(after.value)):
            return None
        if not self.share and before.value > 0 and after.value > 0:
            return Shift(after.value / before.value, None, True)
        return Shift(after.value - before.value, None, False)

    @cached_property
    def numbers(self) -> list[float]:
        """Every finite value and bound."""
        every = (x for row in self.rows.values() for x in (row.value, *(interval(row) or ())))
        return [x for x in every if math.isfinite(x)]

    @cached_property
    def zero(self) -> bool:
        """0 for every model on every subject."""
        return not any(row.value for row in self.rows.values())

    @cached_property
    def share(self) -> bool:
        """Everything lies in [0, 1]: compared by differences; else by ratios, where the numbers allow it."""
        return all(0 <= x <= 1 for x in self.numbers) and all(math.isfinite(row.value) for row in self.rows.values())

    @cached_property
    def digits(self) -> int:
        """Decimals of a share: three where the values are small or the counts are large."""
        small = max(self.numbers, default=1.0) < 0.1
        return 3 if small or max((row.n or 0 for row in self.rows.values()), default=0) >= 1000 else 2

    def shown(self, value: float | None) -> str:
        return number(value, self.share, self.digits)

    def interval(self, row: Row) -> str:
        """`[0.21 0.44]`, or nothing."""
        ends = interval(row)
        return f"[{self.shown(ends.low)} {self.shown(ends.high)}]" if ends else ""

    def spread(self, row: Row) -> str:
        """`±0.03` over the seeds, or nothing."""
        if row.spread is None or math.isnan(row.spread):
            return ""
        plain = not self.share and row.spread < 1 <= abs(row.value)  # no more decimals than the value has
        return f"±{number(row.spread, plain or self.share, 2 if plain else self.digits)}"

    def with_interval(self, row: Row) -> str:
        return " ".join(filter(None, (self.shown(row.value), self.interval(row), self.spread(row))))

    def moved(self, shift: Shift | None) -> str:
        """`−0.68`, or `×1.03` for a ratio; nothing for None."""
        if shift is None:
            return ""
        return f"×{shift.times(shift.value)}" if shift.ratio else signed(shift.value, self.share, self.digits)

    def moved_interval(self, shift: Shift | None) -> str:
        """`[−0.79 −0.55]`, or nothing."""
        if shift is None or shift.interval is None:
            return ""
        ends = (shift.times(x) if shift.ratio else signed(x, self.share, self.digits) for x in shift.interval)
        return f"[{' '.join(ends)}]"

    def by(self, shift: Shift) -> str:
        """How far something fell or rose, without a sign: `by 0.68 [0.55 0.79]`, `×1.03 [1.01 1.05]`."""
        if shift.ratio:
            return f"{self.moved(shift)} {self.moved_interval(shift)}".strip()
        ends = sorted(map(abs, shift.interval)) if shift.interval else []
        if self.share and ends and 0 < ends[0] < 5e-5:
            return f"by {abs(shift.value):.1e} [{' '.join(f'{end:.1e}' for end in ends)}]"
        digits = self.digits
        while ends and digits < 4 and round(ends[0], digits) == 0:
            digits += 1  # the end that makes it certain is not shown as nothing
        bounds = f" [{' '.join(number(end, self.share, digits) for end in ends)}]" if ends else ""
        return f"by {self.shown(abs(shift.value))}{bounds}"

    @cached_property
    def wanted(self) -> dict[Group, str]:
        """`lower`, `higher` or `near 0.5`, by group; nothing where no way is good, or not the same on all of its subjects."""
        by_group: dict[Group, set[str]] = {}
        for subject in self.subjects:
            by_group.setdefault(subject.group, set()).add(subject.way)
        return {group: ways.pop() if len(ways) == 1 else "" for group, ways in by_group.items()}

    @cached_property
    def direction(self) -> str:
        """`Wanted: lower.`, or by group where the groups differ; nothing where no way is good."""
        if len(set(self.wanted.values())) == 1:
            return f"Wanted: {way}." if (way := next(iter(self.wanted.values()))) else ""
        return f"Wanted: {', '.join(f'{way} on {PLACES[group]}' for group, way in self.wanted.items() if way)}."

    def size(self, shift: Shift) -> float:
        """How far up it moved; comparable between subjects: a difference, or that of logarithms."""
        return math.log(shift.value) if shift.ratio and shift.value > 0 else shift.value


@dataclass(frozen=True)
class Scores:
    parts: tuple[str, ...]  # the values to forget
    models: tuple[Model, ...]
    metrics: tuple[Metric, ...]  # of the models as they are
    audits: tuple[Metric, ...] = ()  # of the models under attack
    recovered: tuple[Recovered, ...] = ()
    published: tuple[Published, ...] = ()
    seeds: int = 1
    watched: tuple[Watched, ...] = ()  # what trainings were measured by on their way

    def of_kind(self, *kinds: Kind) -> tuple[Model, ...]:
        return tuple(model for model in self.models if model.kind in kinds)

    @property
    def every(self) -> tuple[Metric, ...]:
        return (*self.metrics, *self.audits)

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.every if metric.name == name), None)

    @property
    def paired(self) -> bool:
        """Whether the differences that claims rest on are there."""
        return any(metric.paired for metric in self.every)


def arranged(results: Results) -> Scores:
    """The results by metric. What has no value, such as a share of no items, is left out."""
    by_metric: dict[str, list[Row]] = {}
    for row in results.rows:
        if not math.isnan(row.value):
            by_metric.setdefault(row.metric, []).append(row)
    paired: dict[str, list[Difference]] = {}
    for difference in results.differences:
        if not math.isnan(difference.value):
            paired.setdefault(difference.metric, []).append(difference)
    metrics = [_metric(rows, paired.get(name, []), results) for name, rows in by_metric.items()]
    return Scores(
        parts=tuple(part.value for part in results.parts),
        models=results.models,
        metrics=tuple(metric for metric in metrics if metric.of is None),
        audits=tuple(metric for metric in metrics if metric.of is not None),
        recovered=tuple(share for share in results.recovered if not math.isnan(share.value)),
        published=results.published,
        seeds=results.seeds,
        watched=results.watched,
    )


def _metric(rows: Sequence[Row], differences: Sequence[Difference], results: Results) -> Metric:
    first = rows[0]
    chances = {row.chance for row in rows if row.chance is not None}
    return Metric(
        name=first.metric,
        subjects=_subjects(rows, results),
        rows={(row.stage, row.subject): row for row in rows},
        paired={(each.stage, each.against, each.subject): _shift(each) for each in differences},
        of=first.of,
        curve=first.curve,
        at=first.at,
        unit=first.unit,
        chance=chances.pop() if len(chances) == 1 else None,
        side=any(row.side for row in rows),
    )


def _subjects(rows: Sequence[Row], results: Results) -> tuple[Subject, ...]:
    groups = {row.subject: row.group for row in rows}
    wanted = {row.subject: (row.wanted, row.target) for row in rows}
    branches = {model.name: model.stage for model in results.models if model.kind == "branch"}
    parts = [part.value for part in results.parts if groups.get(part.value) == "forget"]
    names = dict.fromkeys([*parts, *groups])  # parts in the order of the run
    return tuple(
        Subject(name, group, branches.get(name) if group == "forget" else None, *wanted[name])
        for group in GROUPS
        for name in names
        if groups[name] == group
    )


def _shift(row: Difference) -> Shift:
    return Shift(row.value, interval(row), row.kind == "ratio", row.n, row.changed)


def few_items(scores: Scores) -> str:
    """Where fewer items than SMALL_SAMPLE were measured, in a sentence; nothing where there are more everywhere."""
    counts: dict[tuple[str, str], int] = {}
    for metric in scores.metrics:
        for (_, subject), row in metric.rows.items():
            if row.n is not None and row.n < SMALL_SAMPLE:
                counts[metric.name, subject] = min(row.n, counts.get((metric.name, subject), row.n))
    if not counts:
        return ""
    told = [f"{name(metric)} on {name(subject)} ({count})" for (metric, subject), count in counts.items()]
    none = f" Of fewer than {FEWEST_CERTAIN} none is called certain." if min(counts.values()) < FEWEST_CERTAIN else ""
    more = f" and {len(told) - LISTED} more" if len(told) > LISTED else ""
    return (
        f"Small samples, of fewer than {SMALL_SAMPLE} items: {', '.join(told[:LISTED])}{more}. A change there may go unseen: that "
        f"none is certain does not say that there is none.{none}"
    )
