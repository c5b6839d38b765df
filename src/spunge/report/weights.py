"""What the merge did to the weights, from merge.json, as tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from spunge.errors import printable
from spunge.report.wording import number

LISTED = 4  # branches whose numbers are listed one by one; of more, the smallest and the largest


class TensorLine(NamedTuple):
    name: str
    kept: str
    conflicts: str
    before: str
    after: str
    lost: str  # of the merged delta's norm, in rounding


class MergeFacts(NamedTuple):
    rule: str
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]  # label, weight
    cosine: tuple[tuple[str, ...], ...]
    tensors: tuple[TensorLine, ...]
    mean_kept: str
    mean_conflicts: str
    written: str  # what the rounding made of the merged delta, a sentence


def merge_facts(content: Mapping[str, Any]) -> MergeFacts | None:
    """Ready to be shown; what the file lacks stays empty. None for an empty file."""
    if not content:
        return None
    tensors: Mapping[str, Mapping[str, Any]] = content.get("tensors") or {}
    kept = [share for entry in tensors.values() for share in _numbers(entry.get("kept"))]
    conflicts = [share for entry in tensors.values() for share in _numbers(entry.get("conflicts"))]
    settings = content.get("settings") or {}
    return MergeFacts(
        rule=printable(content.get("rule", "")),
        settings=tuple((printable(key), printable(value)) for key, value in settings.items() if key != "rule"),
        notes=tuple(map(printable, content.get("notes") or [])),
        sources=tuple(
            (printable(s.get("label", "")), printable(s.get("weight", ""))) for s in content.get("sources") or []
        ),
        cosine=tuple(tuple(number(cell, share=True) for cell in row) for row in content.get("cosine") or []),
        tensors=tuple(_line(name, entry) for name, entry in tensors.items()),
        mean_kept=_percent(fmean(kept)) if kept else "",
        mean_conflicts=_percent(fmean(conflicts)) if conflicts else "",
        written=_written(content.get("written")),
    )


def _written(told: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    arrived, lost = _numbers(told.get("arrived")), _numbers(told.get("lost"))
    if not arrived or not lost:
        return ""
    dtype, rounding = printable(told.get("dtype", "")), printable(told.get("rounding", ""))
    evens = (
        ", of random sign from entry to entry, so that it evens out in sums over many"
        if rounding == "stochastic"
        else ""
    )
    return (
        f"Written in {dtype}, rounding {rounding}: {_percent(arrived[0])} of the merged change arrives along its own direction, "
        f"and what rounding takes away or adds has {_percent(lost[0])} of its norm{evens}."
    )


def _line(name: str, entry: Mapping[str, Any]) -> TensorLine:
    return TensorLine(
        name=printable(name),
        kept=_each([_percent(share) for share in sorted_if_many(_numbers(entry.get("kept")))]),
        conflicts=_each([_percent(share) for share in _numbers(entry.get("conflicts"))]),
        before=_each([number(norm) for norm in sorted_if_many(_numbers(entry.get("before")))]),
        after=_each([number(norm) for norm in _numbers(entry.get("after"))]),
        lost=_each([_percent(share) for share in _numbers(entry.get("lost"))]),
    )


def sorted_if_many(values: list[float]) -> list[float]:
    """In the branches' order while they are listed one by one."""
    return sorted(values) if len(values) > LISTED else values


def _each(shown: Sequence[str]) -> str:
    if len(shown) > LISTED:
        return f"{shown[0]} to {shown[-1]}"
    return ", ".join(shown)


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [float(item) for item in values]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
