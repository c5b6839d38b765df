"""What a merge gives, tensor by tensor, without a checkpoint that is written: its delta, and the values it would write."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from spunge.merging.chunks import delta_of, written
from spunge.merging.engine import prepared
from spunge.merging.fast.compiled import fast_path
from spunge.merging.statistics import statistics
from spunge.merging.work import in_order, one_thread_each, processors
from spunge.recipe.merging import RuleSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import narrowed
from spunge.weights.sources import Source


def merged_changes(
    base: Path, sources: Sequence[Source], settings: RuleSettings, weights: Sequence[float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The merged delta, tensor by tensor in the base's shapes, float32, without writing a checkpoint."""
    work, _notes = prepared(
        Checkpoint(base, "--base"), sources, settings, [1.0] * len(sources) if weights is None else weights
    )
    with one_thread_each(), ThreadPoolExecutor(processors()) as pool:
        if work.scope != "tensor" and work.changed:
            work.facts = statistics(work, {"": work.changed}, pool, fast_path(work))
        for name in work.changed:
            if work.scope == "tensor":
                work.facts = statistics(work, {name: [name]}, pool, fast_path(work))
            parts = list(in_order(pool, lambda job: delta_of(work, job), list(work.jobs([name]))))
            yield name, torch.cat(parts).reshape(work.base.tensors[name].shape)


def merged_values(
    base: Path, sources: Sequence[Source], settings: RuleSettings, weights: Sequence[float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that differ from the base's in the checkpoint that `merge` writes, one by one, without writing it."""
    given = [1.0] * len(sources) if weights is None else weights
    work, _notes = prepared(Checkpoint(base), sources, settings, given)
    with one_thread_each(), ThreadPoolExecutor(processors()) as pool:
        fast = fast_path(work)
        if work.scope != "tensor" and work.changed:
            work.facts = statistics(work, {"": work.changed}, pool, fast)
        work.choose_rounding(pool)
        for name in work.changed:
            if work.scope == "tensor":
                work.facts = statistics(work, {name: [name]}, pool, fast)
            parts = list(in_order(pool, lambda job: written(work, fast, job)[1], list(work.jobs([name]))))
            yield name, torch.cat(parts).reshape(work.base.tensors[name].shape)
    for name in narrowed(work.base, work.dtypes):
        if name not in work.changed:
            yield name, work.base.read(name).to(work.dtypes[name])
