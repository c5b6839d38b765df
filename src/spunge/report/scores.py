"""What results.json says, arranged for showing: metrics, each with its subjects in groups, and a cell per stage."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from spunge.report.wording import number, signed

Group = Literal["forget", "mixed", "other", "worst"]
Kind = Literal["base", "branch", "control", "merged", "stage"]
GROUPS: dict[Group, str] = {
    "forget": "Parts to forget",
    "mixed": "All rows together",
    "other": "To be kept",
    "worst": "Worst subject",
}


class Interval(NamedTuple):
    low: float
    high: float


class Cell(NamedTuple):
    """One measurement, with its 95% interval."""

    value: float
    interval: Interval | None = None
    n: int | None = None
    spread: float | None = None  # standard deviation over the seeds
    below_chance: bool = False  # for certain


class Change(NamedTuple):
    """One stage against another on a subject: a difference, or a ratio. Without an interval it is not a paired one."""

    value: float
    interval: Interval | None
    ratio: bool
    n: int | None = None

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


class Stage(NamedTuple):
    key: str  # base, branch:SLUG, control:NAME, merged
    kind: Kind
    name: str  # the branch's value, the control's name, else the key

    @property
    def label(self) -> str:
        return {"branch": f"branch {self.name}", "control": f"{self.name} control"}.get(self.kind, self.name)


class Subject(NamedTuple):
    name: str
    group: Group
    branch: str | None = None  # the stage that unlearned this subject


@dataclass(frozen=True)
class Metric:
    name: str
    higher_is_better: bool
    subjects: tuple[Subject, ...]  # parts to forget first, the worst last
    cells: Mapping[tuple[str, str], Cell]  # (stage, subject)
    paired: Mapping[tuple[str, str, str], Change] = field(default_factory=dict)  # (stage, against, subject)
    of: str | None = None  # the metric that this one measures again, after an attack
    chance: float | None = None  # what guessing gives
    side: bool = False  # a check on another metric

    def cell(self, stage: str, subject: str) -> Cell | None:
        return self.cells.get((stage, subject))

    def judged(self, stages: Iterable[Stage]) -> list[Stage]:
        """Those of the stages that have a score."""
        known = {stage for stage, _ in self.cells}
        return [stage for stage in stages if stage.key in known]

    def change(self, stage: str, against: str, subject: str) -> Change | None:
        """The paired one; where there is none the plain one, which claims nothing; None where a cell is missing."""
        found = self.paired.get((stage, against, subject))
        if found is not None:
            return found
        after, before = self.cell(stage, subject), self.cell(against, subject)
        if before is None or after is None or not (math.isfinite(before.value) and math.isfinite(after.value)):
            return None
        if not self.share and before.value > 0 and after.value > 0:
            return Change(after.value / before.value, None, True)
        return Change(after.value - before.value, None, False)

    @property
    def numbers(self) -> list[float]:
        """Every finite value and bound."""
        every = (x for cell in self.cells.values() for x in (cell.value, *(cell.interval or ())))
        return [x for x in every if math.isfinite(x)]

    @property
    def share(self) -> bool:
        """Everything lies in [0, 1]: compared by differences; else by ratios, where the numbers allow it."""
        return all(0 <= x <= 1 for x in self.numbers) and all(math.isfinite(cell.value) for cell in self.cells.values())

    @property
    def digits(self) -> int:
        """Decimals of a share: three where the values are small or the counts are large."""
        small = max(self.numbers, default=1.0) < 0.1
        return 3 if small or max((cell.n or 0 for cell in self.cells.values()), default=0) >= 1000 else 2

    def shown(self, value: float | None) -> str:
        return number(value, self.share, self.digits)

    def interval(self, cell: Cell) -> str:
        """`[0.21 0.44]`, or nothing."""
        return f"[{self.shown(cell.interval.low)} {self.shown(cell.interval.high)}]" if cell.interval else ""

    def spread(self, cell: Cell) -> str:
        """`±0.03` over the seeds, or nothing."""
        if cell.spread is None:
            return ""
        plain = not self.share and cell.spread < 1 <= abs(cell.value)  # no more decimals than the value has
        return f"±{number(cell.spread, plain or self.share, 2 if plain else self.digits)}"

    def with_interval(self, cell: Cell) -> str:
        return " ".join(filter(None, (self.shown(cell.value), self.interval(cell), self.spread(cell))))

    def moved(self, change: Change | None) -> str:
        """`−0.68`, or `×1.03` for a ratio; nothing for None."""
        if change is None:
            return ""
        return f"×{change.times(change.value)}" if change.ratio else signed(change.value, self.share, self.digits)

    def moved_interval(self, change: Change | None) -> str:
        """`[−0.79 −0.55]`, or nothing."""
        if change is None or change.interval is None:
            return ""
        ends = (change.times(x) if change.ratio else signed(x, self.share, self.digits) for x in change.interval)
        return f"[{' '.join(ends)}]"

    def by(self, change: Change) -> str:
        """How far something fell or rose, without a sign: `by 0.68 [0.55 0.79]`, `×1.03 [1.01 1.05]`."""
        if change.ratio:
            return f"{self.moved(change)} {self.moved_interval(change)}".strip()
        ends = sorted(map(abs, change.interval)) if change.interval else []
        digits = self.digits
        while ends and digits < 4 and round(ends[0], digits) == 0:
            digits += 1  # the end that makes it certain is not shown as nothing
        bounds = f" [{' '.join(number(end, self.share, digits) for end in ends)}]" if ends else ""
        return f"by {self.shown(abs(change.value))}{bounds}"

    def worse(self, change: Change) -> float:
        """How much worse the change makes it; comparable between subjects: a difference, or that of logarithms."""
        size = math.log(change.value) if change.ratio and change.value > 0 else change.value
        return -size if self.higher_is_better else size


class Recovered(NamedTuple):
    """The share of what was forgotten that an attack brings back."""

    stage: str
    subject: str
    metric: str
    value: float
    interval: Interval | None

    @property
    def shown(self) -> str:
        """`62% [40% 81%]`."""
        ends = " ".join(f"{100 * end:.0f}%" for end in self.interval or ())
        return f"{100 * self.value:.0f}%{f' [{ends}]' if ends else ''}".replace("-", "−")


class Published(NamedTuple):
    """A paper's figure."""

    stage: str
    subject: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Scores:
    parts: tuple[str, ...]  # the values to forget
    stages: tuple[Stage, ...]
    metrics: tuple[Metric, ...]  # of the models as they are
    audits: tuple[Metric, ...] = ()  # of the models under attack
    recovered: tuple[Recovered, ...] = ()
    published: tuple[Published, ...] = ()
    seeds: int = 1

    def of_kind(self, *kinds: Kind) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.kind in kinds)

    @property
    def every(self) -> tuple[Metric, ...]:
        return (*self.metrics, *self.audits)

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.every if metric.name == name), None)

    @property
    def paired(self) -> bool:
        """Whether the differences that claims rest on are there."""
        return any(metric.paired for metric in self.every)
