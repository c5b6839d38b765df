"""results.json as Scores. What is missing or is no number is left out, as if it were not there."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from spunge.report.scores import Cell, Change, Interval, Metric, Published, Recovered, Scores, Stage, Subject

WORST = "worst"


def read_scores(results: Mapping[str, Any]) -> Scores:
    """Arrange results.json, of any version: rows alone suffice."""
    rows = _numbered(results, "rows")
    branches = {str(part["value"]): f"branch:{part['slug']}" for part in results.get("parts") or []}
    keys = _unique([*(results.get("stages") or []), *(row["stage"] for row in rows)])
    names = {key: value for value, key in branches.items()}
    # Without an attribute the one part is called `all`, as are evaluations without subjects: nothing tells them apart.
    whole = results.get("attribute") is None and set(branches) <= {"all"}
    differences = _numbered(results, "differences")
    evaluations = results.get("evaluations") or []
    metrics = []
    for name in _unique(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == name]
        overall = {e.get("overall") for e in evaluations if name in e.get("metrics", ())} | {"all"}
        subjects = _subjects(_unique(row["subject"] for row in mine), branches, whole, overall)
        metrics.append(_metric(name, mine, subjects, [row for row in differences if row["metric"] == name]))
    seeds = results.get("seeds")
    return Scores(
        parts=tuple(branches),
        stages=tuple(_stage(key, names) for key in keys),
        metrics=tuple(metric for metric in metrics if metric.of is None),
        audits=tuple(metric for metric in metrics if metric.of is not None),
        recovered=tuple(map(_recovered, _numbered(results, "recovered"))),
        published=tuple(map(_published, _numbered(results, "published"))),
        seeds=int(seeds) if _real(seeds) else 1,
    )


def _metric(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    subjects: tuple[Subject, ...],
    differences: Sequence[Mapping[str, Any]],
) -> Metric:
    chances = {row["chance"] for row in rows if _real(row.get("chance"))}
    return Metric(
        name=name,
        higher_is_better=bool(rows[0].get("higher_is_better", True)),
        subjects=subjects,
        cells={(str(row["stage"]), str(row["subject"])): _cell(row) for row in rows},
        paired={(str(row["stage"]), str(row["against"]), str(row["subject"])): _change(row) for row in differences},
        of=str(rows[0]["of"]) if rows[0].get("of") is not None else None,
        chance=float(chances.pop()) if len(chances) == 1 else None,
        side=any(row.get("side") is True for row in rows),
    )


def _subjects(
    names: list[str], branches: Mapping[str, str], whole: bool, overall: Container[str | None]
) -> tuple[Subject, ...]:
    forgotten = [name for name in branches if name in names and not whole]
    # What holds all rows, of parts and others, is neither forgotten nor kept.
    mixed = [name for name in names if name in overall and (whole or forgotten) and name not in forgotten]
    rest = [name for name in names if name not in forgotten and name not in mixed]
    # `worst of X` is the worst of a metric's subjects beside X, which holds them all.
    worst = [name for name in rest if name == WORST or name.removeprefix(f"{WORST} of ") in set(names) - {name}]
    return (
        *(Subject(name, "forget", branches[name]) for name in forgotten),
        *(Subject(name, "mixed") for name in mixed),
        *(Subject(name, "other") for name in rest if name not in worst),
        *(Subject(name, "worst") for name in worst),
    )


def _stage(key: str, names: Mapping[str, str]) -> Stage:
    kind, colon, rest = key.partition(":")
    if colon and kind == "branch":
        return Stage(key, "branch", names.get(key, rest))
    if colon and kind == "control":
        return Stage(key, "control", rest)
    return Stage(key, "base" if key == "base" else "merged" if key == "merged" else "stage", key)


def _cell(row: Mapping[str, Any]) -> Cell:
    n, spread = row.get("n"), row.get("spread")
    return Cell(
        value=float(row["value"]),
        interval=_interval(row),
        n=int(n) if _real(n) else None,
        spread=float(spread) if _real(spread) else None,
        below_chance=row.get("below_chance") is True,
    )


def _change(row: Mapping[str, Any]) -> Change:
    n = row.get("n")
    return Change(float(row["value"]), _interval(row), row.get("kind") == "ratio", int(n) if _real(n) else None)


def _recovered(row: Mapping[str, Any]) -> Recovered:
    return Recovered(str(row["stage"]), str(row["subject"]), str(row["metric"]), float(row["value"]), _interval(row))


def _published(row: Mapping[str, Any]) -> Published:
    stage, subject, metric, source = (str(row.get(key, "")) for key in ("stage", "subject", "metric", "source"))
    return Published(stage, subject, metric, float(row["value"]), source)


def _interval(row: Mapping[str, Any]) -> Interval | None:
    low, high = row.get("low"), row.get("high")
    return Interval(float(low), float(high)) if _real(low) and _real(high) else None


def _numbered(results: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [row for row in results.get(key) or [] if _real(row.get("value"))]


def _real(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _unique(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))
