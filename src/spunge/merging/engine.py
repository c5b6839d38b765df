"""The streaming pass: base + branches -> merged checkpoint, a few chunks in memory at a time.

The output has the base's own files and layout. Tensors that no branch changed are copied as bytes by the kernel; the others
are read chunk by chunk, merged in float32, rounded once to the base's dtype, and written to their place. Everything is
written aside and renamed when whole; a journal lets an interrupted merge go on where it stopped.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.checkpoints import Checkpoint
from spunge.merging.output import Output
from spunge.merging.outcome import MergeReport, SourceReport, Tally, summed_up, tally
from spunge.merging.rule import Chunk, Cut, Rule, Statistic
from spunge.merging.sources import Mapped, Source
from spunge.merging.thresholds import Bracket, bracket, keys_of, rank_of
from spunge.recipe import RuleSettings
from spunge.registry import RULES, RecipeError

CHUNK = 1 << 17  # entries: a few branches in float32 stay in a core's cache
BATCH = 1 << 23  # entries of the tensors that are worked on together
SAMPLE = 1 << 16  # entries of a tensor that are looked at to guess a threshold
RUN = 1 << 10  # entries of a sample that lie side by side


class Job(NamedTuple):
    name: str
    start: int
    stop: int


@dataclass
class Merge:
    """One merge: what goes in, how, and the chunks' common facts."""

    base: Checkpoint
    sources: Sequence[Source]  # in an order that depends on their content alone
    places: Sequence[int]  # places[i]: where the user's i-th source stands in `sources`
    weights: Sequence[float]  # in the order of `sources`
    rule: Rule
    settings: Any
    threads: int = 1
    chunk: int = CHUNK
    facts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # tensor, or "" for all -> the rule's statistics
    mapped: Mapped = field(init=False)

    def __post_init__(self) -> None:
        self.mapped = Mapped(self.base)
        self._names = [frozenset(source.names) for source in self.sources]
        self._order = [self.places.index(place) for place in range(len(self.sources))]
        self._weights = torch.tensor(self.weights, dtype=torch.float32)

    @property
    def changed(self) -> list[str]:
        """The tensors that any source changes, in the base's order."""
        return [name for name in self.base.tensors if any(name in names for names in self._names)]

    @property
    def scope(self) -> str:
        return str(getattr(self.settings, "scope", "tensor"))

    def jobs(self, names: Sequence[str]) -> Iterator[Job]:
        """The chunks of some tensors; whole rows where the rule needs them."""
        for name in names:
            info = self.base.tensors[name]
            step = self.chunk
            if self.rule.whole_rows:
                columns = info.shape[-1] if info.shape else 1
                step = max(1, step // max(1, columns)) * columns
            for start in range(0, info.numel, max(1, step)):
                yield Job(name, start, min(info.numel, start + step))

    def load(self, job: Job) -> tuple[Tensor, Chunk]:
        """The branches' differences in one chunk, (k, n) float32, and what the rule may know about it."""
        base = self.mapped.view(job.name)[job.start : job.stop].float()
        deltas = torch.zeros(len(self.sources), job.stop - job.start)
        for row, source, names in zip(deltas, self.sources, self._names, strict=True):
            if job.name in names:
                row.copy_(source.read(job.name, job.start, job.stop, base))
        shape = self.base.tensors[job.name].shape
        chunk = Chunk(
            weights=self._weights,
            name=job.name,
            start=job.start,
            columns=shape[-1] if shape else 1,
            seeds=tuple(int(source.fingerprint[:15], 16) for source in self.sources),
            order=tuple(self._order),
            base=base,
            facts=self.facts.get(job.name, self.facts.get("", {})),
        )
        return deltas, chunk

    def population(self, names: Sequence[str]) -> int:
        """How many entries a share is counted over."""
        counted = self.base.tensors if self.scope == "model" else names
        return sum(self.base.tensors[name].numel for name in counted if self.base.tensors[name].dtype.is_floating_point)


def merge(
    base: Path,
    sources: Sequence[Source],
    settings: RuleSettings,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    notes: Sequence[str] = (),
) -> MergeReport:
    """Merge `sources` into `base` and write the checkpoint `out`.

    weights: one per source, 1 by default. progress: called with (entries done, entries to do). threads: all cores by
    default; the result does not depend on it. A folder `out` that an earlier merge wrote is replaced, any other refused; one
    that holds this very merge is left as it is. Raises RecipeError when the inputs do not fit, before anything is written,
    and when a chunk holds NaN or Inf, with nothing left at `out`.
    """
    from spunge.merging.checks import check

    checkpoint = Checkpoint(base)
    rule = RULES.get(settings.rule)
    given = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    notes = [*notes, *check(checkpoint, sources, rule, settings, given)]
    order = sorted(range(len(sources)), key=lambda place: (sources[place].fingerprint, given[place], sources[place].label))
    work = Merge(
        base=checkpoint,
        sources=[sources[place] for place in order],
        places=[order.index(place) for place in range(len(sources))],
        weights=[given[place] for place in order],
        rule=rule,
        settings=settings,
        threads=threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1,
    )
    reports = [SourceReport(s.label, s.fingerprint, weight) for s, weight in zip(sources, given, strict=True)]
    output = Output(checkpoint, out, work.changed, _key(work))
    if (earlier := output.earlier()) is not None:
        return earlier
    with output.opened(), _one_thread_each(), ThreadPoolExecutor(work.threads) as pool:
        tallies = _stream(work, output, pool, progress or _silent)
        tensors, cosine = summed_up({name: tallies[name] for name in work.changed}, work.places)
        report = MergeReport(
            settings.rule, settings.model_dump(mode="json"), base.resolve().name, reports, tensors, cosine, output.key, notes
        )
        output.finish(report)
    return report


def _silent(done: int, total: int) -> None:
    pass


def _key(work: Merge) -> dict[str, Any]:
    """What the result depends on."""
    return {
        "rule": work.settings.model_dump(mode="json"),
        "version": work.rule.version,
        "sources": [[source.fingerprint, weight] for source, weight in zip(work.sources, work.weights, strict=True)],
        "order": list(work.places),
    }


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Chunks run side by side, so torch itself uses one thread in each; also makes every product round the same way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(work: Merge, output: Output, pool: ThreadPoolExecutor, progress: Callable[[int, int], None]) -> dict[str, Tally]:
    """Statistics, then the merge itself, batch after batch; returns the tally of each tensor."""
    changed = work.changed
    left = [name for name in changed if name not in output.done]
    if work.scope != "tensor" and left:
        work.facts[""] = output.facts or _facts(work, changed, pool)
        output.note_facts(work.facts[""])
    total = sum(work.base.tensors[name].numel for name in changed)
    finished = total - sum(work.base.tensors[name].numel for name in left)
    progress(finished, total)
    for batch in _batches(work, left):
        if work.scope == "tensor":
            work.facts = _facts_per_tensor(work, batch, pool)
        tallies = {name: Tally.empty(len(work.sources)) for name in batch}
        for job, part in pool_map(pool, lambda job: (job, _merge_chunk(work, output, job)), list(work.jobs(batch))):
            tallies[job.name].add(part)
            finished += job.stop - job.start
            progress(finished, total)
        for name in batch:
            output.note_done(name, tallies[name])
    return output.done


def pool_map(pool: ThreadPoolExecutor, function: Callable[[Job], Any], jobs: Sequence[Job]) -> Iterator[Any]:
    """Results in the jobs' order; the first error cancels what has not begun."""
    futures = [pool.submit(function, job) for job in jobs]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _batches(work: Merge, names: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += work.base.tensors[name].numel
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _merge_chunk(work: Merge, output: Output, job: Job) -> Tally:
    deltas, chunk = work.load(job)
    kept = work.rule.trimmed(deltas, work.settings, chunk)
    merged = work.rule.combine(kept, work.settings, chunk)
    counts = tally(deltas, kept, merged)
    if not bool(torch.isfinite(counts.gram).all()):
        _refuse_not_finite(work, job, deltas)
        counts = replace(counts, gram=(deltas.double() @ deltas.double().T))
    assert chunk.base is not None
    result = (chunk.base + merged).to(work.base.tensors[job.name].dtype)
    if len(work.sources) == 1:
        # base + (model - base) rounds; where the merge is that very difference, the model's own value is meant.
        raw = getattr(work.sources[0], "raw", None)
        if raw is not None:
            own = raw(job.name)[job.start : job.stop]
            result = torch.where(merged == deltas[0], own.to(result.dtype), result)
    if not bool(torch.isfinite(result).all()):
        raise RecipeError(
            f"merge: tensor {job.name!r} is not finite after the merge in {str(result.dtype)[6:]}; lower merge.scale"
        )
    output.write(job.name, job.start, result)
    return counts


def _refuse_not_finite(work: Merge, job: Job, deltas: Tensor) -> None:
    base = work.mapped.view(job.name)[job.start : job.stop]
    if not bool(torch.isfinite(base).all()):
        raise RecipeError(f"--base: tensor {job.name!r} of the base holds NaN or Inf; download it again")
    for source, row in zip(work.sources, deltas, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise RecipeError(f"--model: tensor {job.name!r} of {source.label!r} holds NaN or Inf; leave that model out")


def _facts(work: Merge, names: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, Tensor]:
    """The rule's statistics over some tensors taken as one, each from one or more passes."""
    found: dict[str, Tensor] = {}
    for wanted in work.rule.wanted(work.settings, len(work.sources)):
        found[wanted.name] = _statistics(work, {"": names}, wanted, {"": found}, pool)[""]
    return found


def _facts_per_tensor(work: Merge, names: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, dict[str, Tensor]]:
    """The same for each tensor by itself; the passes run over all of them together."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for wanted in work.rule.wanted(work.settings, len(work.sources)):
        for name, fact in _statistics(work, {name: [name] for name in names}, wanted, found, pool).items():
            found[name][wanted.name] = fact
    return found


Facts = dict[str, dict[str, Tensor]]


def _statistics(
    work: Merge, groups: dict[str, Sequence[str]], wanted: Statistic, known: Facts, pool: ThreadPoolExecutor
) -> dict[str, Tensor]:
    """One statistic for each group of tensors."""
    work.facts = known
    group_of = {name: group for group, names in groups.items() for name in names}
    jobs = [job for names in groups.values() for job in work.jobs(names)]

    def measured(job: Job) -> Tensor:
        deltas, chunk = work.load(job)
        return wanted.measure(deltas, work.settings, chunk)

    if not isinstance(wanted, Cut):
        sums: dict[str, Tensor] = {}
        for name, part in pool_map(pool, lambda job: (job.name, measured(job).double().sum(dim=1)), jobs):
            sums[group_of[name]] = sums[group_of[name]] + part if group_of[name] in sums else part
        return sums
    brackets = {group: _first_brackets(work, names, wanted) for group, names in groups.items()}
    lock = threading.Lock()

    def count(job: Job) -> None:
        rows = brackets[group_of[job.name]]
        for row, place in zip(measured(job), rows, strict=True):
            if not place.found:
                above, places = place.add(keys_of(row))
                with lock:
                    place.collect(above, places)

    while any(not place.found for rows in brackets.values() for place in rows):
        todo = [job for job in jobs if not all(place.found for place in brackets[group_of[job.name]])]
        for _ in pool_map(pool, count, todo):
            pass
        for rows in brackets.values():
            for place in rows:
                place.narrow()
    return {group: torch.tensor([place.threshold for place in rows]) for group, rows in brackets.items()}


def _first_brackets(work: Merge, names: Sequence[str], wanted: Cut) -> list[Bracket]:
    """Brackets guessed from runs of entries spread over the tensors."""
    population = work.population(names)
    given = [wanted.shares[place] for place in work._order] if wanted.per_branch else list(wanted.shares)
    ranks = [rank_of(share, population) for share in given]
    total = sum(work.base.tensors[name].numel for name in names)
    parts: list[Tensor] = []
    if any(0 < rank < total for rank in ranks):
        for job in _sample_jobs(work, names, total):
            deltas, chunk = work.load(job)
            parts.append(keys_of(wanted.measure(deltas, work.settings, chunk)))
    rows = list(torch.cat(parts, dim=1)) if parts else [None] * len(ranks)
    # Entries outside the stream are zeros: where the rank reaches them, everything is kept.
    return [bracket(rank, total, row) for rank, row in zip(ranks, rows, strict=True)]


def _sample_jobs(work: Merge, names: Sequence[str], total: int) -> Iterator[Job]:
    if total <= SAMPLE:
        for name in names:
            yield Job(name, 0, work.base.tensors[name].numel)
        return
    runs = SAMPLE // RUN
    for name in names:
        size = work.base.tensors[name].numel
        share = max(1, round(runs * size / total))
        step = max(1, size // share)
        length = min(step, RUN)
        for start in range(0, size - length + 1, step):
            yield Job(name, start, start + length)
