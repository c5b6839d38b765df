"""What the merge did to the weights, by block and projection: a heat map of merge.json, and the change of each block."""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any, NamedTuple

from spunge.report.wording import MISSING, name, number

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.(.+?)(?:\.weight|\.bias)?$")
EXPERT = re.compile(r"\.?experts?\.\d+\.?")
ROWS = 200  # blocks, at most
BRANCHES = 24


class Cell(NamedTuple):
    shown: str
    shade: int  # 0 to 100, of the largest


class Map(NamedTuple):
    """A quantity: a line for each block, a cell for each projection or branch."""

    title: str
    said: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell | None, ...]], ...]


class Bar(NamedTuple):
    block: str
    shown: str
    share: int  # percent of the largest


class Heat(NamedTuple):
    maps: tuple[Map, ...]
    bars: tuple[Bar, ...]


class _Tensor(NamedTuple):
    block: int
    projection: str
    entry: Mapping[str, Any]


def heat(content: Mapping[str, Any]) -> Heat:
    """Empty where the tensors' names tell no block."""
    tensors = list(_located(content.get("tensors") or {}))
    kept = _map("Entries kept by the trim", "Mean over the branches.", tensors, "kept", share=True)
    conflicts = _map("Sign conflicts", "Of entries that several branches kept.", tensors, "conflicts", share=True)
    after = _map("Norm of the merged change", "The stronger the colour, the larger.", tensors, "after", share=False)
    labels = [str(source.get("label", "")) for source in content.get("sources") or []]
    before = _branches(tensors, labels)
    return Heat(tuple(each for each in (after, kept, conflicts, before) if each), _bars(tensors))


def _located(tensors: Mapping[str, Mapping[str, Any]]) -> list[_Tensor]:
    located = []
    for tensor, entry in tensors.items():
        match = LAYER.search(tensor)
        if match:
            located.append(_Tensor(int(match[1]), EXPERT.sub(" experts ", match[2]).strip(), entry))
    return located


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [float(each) for each in values]


def _map(title: str, said: str, tensors: Sequence[_Tensor], key: str, share: bool) -> Map | None:
    """share: means of shares; else norms, which add up as squares do."""
    values: dict[tuple[int, str], list[float]] = {}
    for tensor in tensors:
        if known := _numbers(tensor.entry.get(key)):
            values.setdefault((tensor.block, tensor.projection), []).extend(known)
    if not values:
        return None
    cells = {place: fmean(each) if share else _norm(each) for place, each in values.items()}
    return _laid_out(f"{title}, by block and projection", said, cells, share)


def _branches(tensors: Sequence[_Tensor], labels: Sequence[str]) -> Map | None:
    """How much each branch had changed each block, before the merge."""
    values: dict[tuple[int, str], list[float]] = {}
    for tensor in tensors:
        norms = _numbers(tensor.entry.get("before"))
        if len(norms) == len(labels):
            for label, norm in list(zip(labels, norms, strict=True))[:BRANCHES]:
                values.setdefault((tensor.block, label), []).append(norm)
    said = "Before the merge, of all of a block's tensors together. The stronger the colour, the larger."
    cells = {place: _norm(each) for place, each in values.items()}
    return _laid_out("Norm of each branch's change, by block", said, cells, False) if cells else None


def _laid_out(title: str, said: str, cells: Mapping[tuple[int, str], float], share: bool) -> Map:
    largest = max(cells.values()) or 1.0
    heads = tuple(dict.fromkeys(head for _, head in cells))
    lines = []
    for block in sorted({block for block, _ in cells})[:ROWS]:
        row = [cells.get((block, head)) for head in heads]
        lines.append((str(block), tuple(None if value is None else _cell(value, largest, share) for value in row)))
    return Map(title, said, tuple(map(name, heads)), tuple(lines))


def _cell(value: float, largest: float, share: bool) -> Cell:
    return Cell(f"{100 * value:.1f}%" if share else number(value), round(100 * value / largest))


def _norm(values: Sequence[float]) -> float:
    return sqrt(sum(value * value for value in values))


def _bars(tensors: Sequence[_Tensor]) -> tuple[Bar, ...]:
    """How much the merge changed each block: the norm of its tensors' changes together."""
    by_block: dict[int, list[float]] = {}
    for tensor in tensors:
        by_block.setdefault(tensor.block, []).extend(_numbers(tensor.entry.get("after")))
    norms = {block: _norm(values) for block, values in sorted(by_block.items()) if values}
    largest = max(norms.values(), default=0.0) or 1.0
    return tuple(
        Bar(str(block), number(norm) if norm else MISSING, round(100 * norm / largest))
        for block, norm in list(norms.items())[:ROWS]
    )
