"""One chunk of a merge: what is written of it, compiled or in torch, and the sums that are reported."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.merging.fast.compiled import Fast
from spunge.merging.outcome import Tally, tally
from spunge.merging.work import Job, Work
from spunge.weights.rounding import all_finite, rounded


class Target(Protocol):
    """Where a merge writes."""

    def write(self, name: str, start: int, values: Tensor) -> None: ...


def merge_chunk(work: Work, output: Target, fast: Fast | None, job: Job) -> Tally:
    """Merge one chunk and write it; returns what is reported of it."""
    counts, result = written(work, fast, job)
    output.write(job.name, job.start, result)
    return counts


def written(work: Work, fast: Fast | None, job: Job) -> tuple[Tally, Tensor]:
    """What is written of one chunk, and its sums. Raises RecipeError where it is not finite."""
    if fast and fast.merges and len(work.sources) > 1:
        counts, result, finite = fast.merge(job)
    else:
        counts, result = _merged_by_torch(work, job)
        finite = all_finite(result)
    if not bool(torch.isfinite(counts.gram).all()):
        counts = _recounted(work, job, counts)
    if not finite:
        dtype = str(result.dtype).removeprefix("torch.")
        raise RecipeError(f"merge.scale: tensor {job.name!r} is not finite after the merge in {dtype}; lower the scale")
    return counts, result


def _merged_by_torch(work: Work, job: Job) -> tuple[Tally, Tensor]:
    deltas, chunk = work.load(job)
    kept = work.rule.trimmed(deltas, work.settings, chunk)
    merged = work.rule.combine(kept, work.settings, chunk)
    base = work.base_values(job)
    values = base + merged
    if len(work.sources) == 1 and (own := work.sources[0].raw(job.name)) is not None:
        # base + (model - base) may round; where the merge is that very difference, the model's own value is meant.
        values = torch.where(merged == deltas[0], own[job.start : job.stop].float(), values)
    result = rounded(values, work.dtypes[job.name], work.drawn(job))
    counts = tally(deltas, kept, merged, chunk.weights)
    counts.note_written(base, merged, result)
    return counts, result


def _recounted(work: Work, job: Job, counts: Tally) -> Tally:
    """Squares of large finite numbers overflow float32: count again in float64. Raises RecipeError for NaN and Inf."""
    deltas, _chunk = work.load(job)
    _refuse_not_finite(work, job, deltas)
    return replace(counts, gram=deltas.double() @ deltas.double().T)


def _refuse_not_finite(work: Work, job: Job, deltas: Tensor) -> None:
    if not bool(torch.isfinite(work.base_values(job)).all()):
        raise RecipeError(f"{work.base.setting}: tensor {job.name!r} of the base holds NaN or Inf; download it again")
    for source, row in zip(work.sources, deltas, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise RecipeError(
                f"{source.setting}: tensor {job.name!r} of {source.label!r} holds NaN or Inf; leave it out"
            )


def delta_of(work: Work, job: Job) -> Tensor:
    """The merged delta in one chunk, float32. Raises RecipeError for NaN and Inf."""
    deltas, chunk = work.load(job)
    if not bool(torch.isfinite(deltas).all()):
        _refuse_not_finite(work, job, deltas)
    return work.rule(deltas, work.settings, chunk)
