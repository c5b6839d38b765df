"""The rows of results.json, arranged for showing: metrics, each with its subjects in groups, and a cell per stage."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

from spunge.report.wording import number, signed

Group = Literal["forget", "mixed", "other"]
Kind = Literal["base", "branch", "control", "merged", "stage"]
GROUPS: dict[Group, str] = {"forget": "Parts to forget", "mixed": "All rows together", "other": "To be kept"}


class Interval(NamedTuple):
    low: float
    high: float


class Cell(NamedTuple):
    """One measurement, with its 95% interval."""

    value: float
    interval: Interval | None = None
    n: int | None = None


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
    subjects: tuple[Subject, ...]  # parts to forget first
    cells: Mapping[tuple[str, str], Cell]  # (stage, subject)

    def cell(self, stage: str, subject: str) -> Cell | None:
        return self.cells.get((stage, subject))

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

    def with_interval(self, cell: Cell) -> str:
        return f"{self.shown(cell.value)} {self.interval(cell)}".strip()

    def change(self, before: Cell | None, after: Cell | None) -> str:
        """`−0.68` for a share, `×1.03` for positive numbers of any size; nothing where a cell is missing."""
        if before is None or after is None or not (math.isfinite(before.value) and math.isfinite(after.value)):
            return ""
        if not self.share and before.value > 0 and after.value > 0:
            return f"×{number(after.value / before.value)}"
        return signed(after.value - before.value, self.share, self.digits)

    def loss(self, before: Cell, after: Cell) -> float:
        """How much worse `after` is; comparable between subjects: a difference of shares, or of logarithms."""
        down = math.log if not self.share and before.value > 0 and after.value > 0 else float
        if before.value == after.value:
            return 0.0  # also where both are infinite
        worse = down(before.value) - down(after.value)
        return worse if self.higher_is_better else -worse


@dataclass(frozen=True)
class Scores:
    parts: tuple[str, ...]  # the values to forget
    stages: tuple[Stage, ...]
    metrics: tuple[Metric, ...]

    def of_kind(self, *kinds: Kind) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.kind in kinds)


def overlap(one: Cell | None, other: Cell | None) -> bool | None:
    """Whether two intervals share a point; None where one is missing."""
    if one is None or other is None or one.interval is None or other.interval is None:
        return None
    return one.interval.low <= other.interval.high and other.interval.low <= one.interval.high


def read_scores(results: Mapping[str, Any]) -> Scores:
    """Arrange results.json. Rows without a number are left out, as if they were not there."""
    rows = [row for row in results.get("rows") or [] if _real(row.get("value"))]
    branches = {str(part["value"]): f"branch:{part['slug']}" for part in results.get("parts") or []}
    keys = _unique([*(results.get("stages") or []), *(row["stage"] for row in rows)])
    names = {key: value for value, key in branches.items()}
    # Without an attribute the one part is called `all`, as are evaluations without subjects: nothing tells them apart.
    whole = results.get("attribute") is None and set(branches) <= {"all"}
    metrics = []
    for name in _unique(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == name]
        cells = {(str(row["stage"]), str(row["subject"])): _cell(row) for row in mine}
        subjects = _subjects(_unique(row["subject"] for row in mine), branches, whole)
        metrics.append(Metric(name, bool(mine[0].get("higher_is_better", True)), subjects, cells))
    return Scores(tuple(branches), tuple(_stage(key, names) for key in keys), tuple(metrics))


def _subjects(names: list[str], branches: Mapping[str, str], whole: bool) -> tuple[Subject, ...]:
    forgotten = [name for name in branches if name in names and not whole]
    # `all` beside parts may hold their rows as well, so it is neither forgotten nor kept.
    mixed = [name for name in names if name == "all" and (whole or forgotten) and name not in forgotten]
    others = [name for name in names if name not in forgotten and name not in mixed]
    return (
        *(Subject(name, "forget", branches[name]) for name in forgotten),
        *(Subject(name, "mixed") for name in mixed),
        *(Subject(name, "other") for name in others),
    )


def _stage(key: str, names: Mapping[str, str]) -> Stage:
    kind, colon, rest = key.partition(":")
    if colon and kind == "branch":
        return Stage(key, "branch", names.get(key, rest))
    if colon and kind == "control":
        return Stage(key, "control", rest)
    return Stage(key, "base" if key == "base" else "merged" if key == "merged" else "stage", key)


def _cell(row: Mapping[str, Any]) -> Cell:
    low, high, n = row.get("low"), row.get("high"), row.get("n")
    interval = Interval(float(low), float(high)) if _real(low) and _real(high) else None
    return Cell(float(row["value"]), interval, int(n) if _real(n) else None)


def _real(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _unique(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))
