"""The streaming pass: base + branches -> merged checkpoint, a few chunks in memory at a time.

The output has the base's own files and layout. Tensors that no branch changed are copied as bytes by the kernel; the
others are read chunk by chunk, merged in float32, rounded once to the base's dtype, and written to their place.
Everything is written aside and renamed when whole; a journal lets an interrupted merge go on where it stopped.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.merging.checks import check
from spunge.merging.fast.compiled import Fast, fast_path
from spunge.merging.outcome import MergeReport, SourceReport, Tally, summed_up, tally
from spunge.merging.output import Output
from spunge.merging.statistics import statistics
from spunge.merging.work import Job, Work, in_order
from spunge.progress import SILENT, Steps
from spunge.recipe.schema import RuleSettings
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.sources import Source

CHUNK = 1 << 16  # entries: in torch, a few branches' float32 temporaries stay in a core's cache
COMPILED_CHUNK = 1 << 19  # the compiled path goes block by block inside
BATCH = 1 << 25  # entries of the tensors that are worked on together


class Target(Protocol):
    """Where a merge writes."""

    def write(self, name: str, start: int, values: Tensor) -> None: ...


def merge(
    base: Path,
    sources: Sequence[Source],
    settings: RuleSettings,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Steps = SILENT.step,
    threads: int | None = None,
    compiled: bool | None = None,
    chunk: int | None = None,
    notes: Sequence[str] = (),
) -> MergeReport:
    """Merge `sources` into `base` and write the checkpoint `out`.

    weights: one per source, 1 by default. progress: hears the entries done and to do. threads (all cores by
    default), chunk (entries) and compiled (False: torch alone) change the time it takes, never the result. A folder
    `out` that an earlier merge wrote is replaced, any other refused; one that holds this very merge is left as it is.
    Raises RecipeError when the inputs do not fit, before anything is written, and when NaN or Inf turns up, with
    nothing left at `out`.
    """
    given = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    work, odd = prepared(Checkpoint(base, "--base"), sources, settings, given, chunk or CHUNK)
    notes = [*notes, *odd]
    output = Output(work.base, out, [source.label for source in sources], work.changed, _key(work))
    if (earlier := output.earlier()) is not None:
        return earlier
    with output.opened(), one_thread_each(), ThreadPoolExecutor(threads or processors()) as pool:
        fast = fast_path(work, compiled)  # copying has begun: what this imports costs no time then
        if fast and chunk is None:
            work.chunk = COMPILED_CHUNK
        tallies = _stream(work, output, pool, fast, progress)
        tensors, cosine = summed_up({name: tallies[name] for name in work.changed}, work.places)
        reports = [SourceReport(s.label, s.fingerprint, weight) for s, weight in zip(sources, given, strict=True)]
        plain = settings.model_dump(mode="json")
        report = MergeReport(settings.rule, plain, base.resolve().name, reports, tensors, cosine, output.key, notes)
        report = output.finish(report)
    return report


def prepared(
    base: Checkpoint, sources: Sequence[Source], settings: RuleSettings, weights: Sequence[float], chunk: int = CHUNK
) -> tuple[Work, list[str]]:
    """The work of a merge, checked, and notes on what is odd. Raises RecipeError for inputs that do not fit."""
    rule = RULES.get(settings.rule)
    notes = check(base, sources, rule, settings, weights)
    order = sorted(range(len(sources)), key=lambda i: (sources[i].fingerprint, weights[i], sources[i].label))
    work = Work(
        base=base,
        sources=[sources[place] for place in order],
        places=[order.index(place) for place in range(len(sources))],
        weights=[weights[place] for place in order],
        rule=rule,
        settings=settings,
        chunk=chunk,
    )
    return work, notes


def merged_changes(
    base: Path, sources: Sequence[Source], settings: RuleSettings, weights: Sequence[float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The merged delta, tensor by tensor in the base's shapes, float32, without writing a checkpoint."""
    work, _notes = prepared(
        Checkpoint(base, "--base"), sources, settings, [1.0] * len(sources) if weights is None else weights
    )
    with one_thread_each(), ThreadPoolExecutor(processors()) as pool:
        if work.scope != "tensor":
            work.facts = statistics(work, {"": work.changed}, pool, fast_path(work))
        for name in work.changed:
            if work.scope == "tensor":
                work.facts = statistics(work, {name: [name]}, pool, fast_path(work))
            parts = list(in_order(pool, lambda job: _delta_of(work, job), list(work.jobs([name]))))
            yield name, torch.cat(parts).reshape(work.base.tensors[name].shape)


def _delta_of(work: Work, job: Job) -> Tensor:
    deltas, chunk = work.load(job)
    if not bool(torch.isfinite(deltas).all()):
        _refuse_not_finite(work, job, deltas)
    return work.rule(deltas, work.settings, chunk)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(work: Work) -> dict[str, Any]:
    """What the result depends on, beside the base."""
    return {
        "rule": work.settings.model_dump(mode="json"),
        "version": RULES.version(work.settings.rule),
        "sources": [[source.fingerprint, weight] for source, weight in zip(work.sources, work.weights, strict=True)],
        "stamps": [list(source.stamps) for source in work.sources],
        "order": list(work.places),
    }


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Chunks run side by side, so torch uses one thread in each; this also makes every product round the same way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(
    work: Work, output: Output, pool: ThreadPoolExecutor, fast: Fast | None, progress: Steps
) -> dict[str, Tally]:
    """Statistics, then the merge itself, batch after batch; returns the tally of each tensor."""
    changed = work.changed
    left = [name for name in changed if name not in output.done]
    if work.scope != "tensor" and left:
        whole = {"": output.facts} if output.facts else statistics(work, {"": changed}, pool, fast)
        output.note_facts(whole[""])
        work.facts = whole
    total = work.entries(changed)
    finished = total - work.entries(left)
    progress(finished, total)
    for batch in _batches(work, left):
        if work.scope == "tensor":
            work.facts = statistics(work, {name: [name] for name in batch}, pool, fast)
        tallies = {name: Tally.empty(len(work.sources)) for name in batch}
        jobs = list(work.jobs(batch))
        for job, part in zip(jobs, in_order(pool, lambda job: merge_chunk(work, output, fast, job), jobs), strict=True):
            tallies[job.name].add(part)
            finished += job.stop - job.start
            progress(finished, total)
        for name in batch:
            output.note_done(name, tallies[name])
    return output.done


def _batches(work: Work, names: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in names:
        batch.append(name)
        if work.entries(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def merge_chunk(work: Work, output: Target, fast: Fast | None, job: Job) -> Tally:
    """Merge one chunk and write it; returns what is reported of it."""
    if fast and fast.merges and len(work.sources) > 1:
        counts, result, finite = fast.merge(job)
    else:
        counts, result = _merged_by_torch(work, job)
        finite = bool(torch.isfinite(result).all())
    if not bool(torch.isfinite(counts.gram).all()):
        counts = _recounted(work, job, counts)
    if not finite:
        dtype = str(result.dtype).removeprefix("torch.")
        raise RecipeError(f"merge.scale: tensor {job.name!r} is not finite after the merge in {dtype}; lower the scale")
    output.write(job.name, job.start, result)
    return counts


def _merged_by_torch(work: Work, job: Job) -> tuple[Tally, Tensor]:
    deltas, chunk = work.load(job)
    kept = work.rule.trimmed(deltas, work.settings, chunk)
    merged = work.rule.combine(kept, work.settings, chunk)
    base = work.base_values(job)
    result = (base + merged).to(work.base.tensors[job.name].dtype)
    if len(work.sources) == 1 and (own := work.sources[0].raw(job.name)) is not None:
        # base + (model - base) may round; where the merge is that very difference, the model's own value is meant.
        result = torch.where(merged == deltas[0], own[job.start : job.stop].to(result.dtype), result)
    return tally(deltas, kept, merged), result


def _recounted(work: Work, job: Job, counts: Tally) -> Tally:
    """Squares of large finite numbers overflow float32: count again in float64. Raises RecipeError for NaN and Inf."""
    deltas, _chunk = work.load(job)
    _refuse_not_finite(work, job, deltas)
    return replace(counts, gram=deltas.double() @ deltas.double().T)


def _refuse_not_finite(work: Work, job: Job, deltas: Tensor) -> None:
    if not bool(torch.isfinite(work.base_values(job)).all()):
        raise RecipeError(f"--base: tensor {job.name!r} of the base holds NaN or Inf; download it again")
    for source, row in zip(work.sources, deltas, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise RecipeError(f"--model: tensor {job.name!r} of {source.label!r} holds NaN or Inf; leave it out")
