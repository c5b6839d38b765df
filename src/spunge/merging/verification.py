"""Is a checkpoint base + merge of these sources? Computed again and compared bit for bit, tensor by tensor, in flat memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.merging.chunks import merge_chunk
from spunge.merging.engine import prepared
from spunge.merging.fast.compiled import fast_path
from spunge.merging.statistics import statistics
from spunge.merging.work import in_order, one_thread_each, processors
from spunge.recipe.merging import RuleSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.sources import Mapped, Source

COMPARED = 1 << 22  # entries of an unchanged tensor that are compared at once


class Compared(NamedTuple):
    name: str
    same: bool


class _Comparison:
    """Stands where the merge writes: compares what would be written with what is there."""

    def __init__(self, written: Mapped) -> None:
        self.written = written
        self.differing: set[str] = set()

    def write(self, name: str, start: int, values: Tensor) -> None:
        there = self.written.view(name)[start : start + values.numel()]
        if there.dtype != values.dtype or not torch.equal(
            there.view(torch.uint8), values.reshape(-1).view(torch.uint8)
        ):
            self.differing.add(name)


def differing_tensors(
    base: Path, sources: Sequence[Source], settings: RuleSettings, out: Path, weights: Sequence[float] | None = None
) -> Iterator[Compared]:
    """Every tensor of the base, and whether `out` holds what the merge would write. Raises RecipeError where a tensor is
    missing from `out`, or has another shape."""
    work, _notes = prepared(Checkpoint(base), sources, settings, [1.0] * len(sources) if weights is None else weights)
    written = Checkpoint(out)
    for name, info in work.base.tensors.items():
        if name not in written.tensors or written.tensors[name].shape != info.shape:
            raise RecipeError(f"{str(out)!r} has no tensor {name!r} of shape {list(info.shape)}, which the base has")
    comparison = _Comparison(Mapped(written))
    changed = frozenset(work.changed)
    fast = fast_path(work)
    with one_thread_each(), ThreadPoolExecutor(processors()) as pool:
        if work.scope != "tensor" and changed:
            work.facts = statistics(work, {"": work.changed}, pool, fast)
        work.choose_rounding(pool)
        for name in work.base.tensors:
            if name not in changed:
                yield Compared(
                    name, _unchanged(work.mapped.view(name), comparison.written.view(name), work.dtypes[name])
                )
                continue
            if work.scope == "tensor":
                work.facts = statistics(work, {name: [name]}, pool, fast)
            for _ in in_order(pool, lambda job: merge_chunk(work, comparison, fast, job), list(work.jobs([name]))):
                pass
            yield Compared(name, name not in comparison.differing)


def _unchanged(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    pieces = (slice(at, at + COMPARED) for at in range(0, before.numel(), COMPARED))
    return after.dtype == dtype and all(
        torch.equal(before[piece].to(dtype).view(torch.uint8), after[piece].view(torch.uint8)) for piece in pieces
    )
