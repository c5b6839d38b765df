"""The streaming pass: base + branches -> merged checkpoint, a few chunks in memory at a time.

The output has the base's own files. Tensors that no branch changed are copied as bytes by the kernel; the others are
read chunk by chunk, merged in float32, rounded once to the dtype they are to have, and written to their place.
Everything is written aside and renamed when whole; a journal lets an interrupted merge go on where it stopped.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spunge.errors import RecipeError
from spunge.merging.changes import changed_names, identity, in_own_order
from spunge.merging.checks import check
from spunge.merging.chunks import merge_chunk
from spunge.merging.earlier import CHECKPOINT, DAMAGED, earlier, merge_key
from spunge.merging.fast.compiled import Fast, fast_path
from spunge.merging.moments import taking
from spunge.merging.outcome import (
    MergeReport,
    Tally,
    reports_of,
    rounding_notes,
    summed_up,
    written_of,
)
from spunge.merging.output import Output
from spunge.merging.statistics import statistics
from spunge.merging.work import Work, in_order, one_thread_each, processors
from spunge.progress import SILENT, Steps
from spunge.recipe.merging import RuleSettings
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.folder import name_of
from spunge.weights.moments import moments_of
from spunge.weights.rounding import refuse_idle_rounding
from spunge.weights.sources import Mapped, Source

CHUNK = 1 << 16  # entries: in torch, a few branches' float32 temporaries stay in a core's cache
COMPILED_CHUNK = 1 << 19  # the compiled path goes block by block inside
BATCH = 1 << 25  # entries of the tensors that are worked on together


def merge(
    base: str | Path,
    sources: Sequence[Source],
    settings: RuleSettings,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Steps = SILENT.step,
    threads: int | None = None,
    compiled: bool | None = None,
    chunk: int | None = None,
    notes: Sequence[str] = (),
    setting: str = "--base",
    replace: bool = False,
) -> MergeReport:
    """Merge `sources` into `base` and write the checkpoint `out`.

    weights: one per source, 1 by default. progress: hears the entries done and to do. threads (all cores by
    default), chunk (entries) and compiled (False: torch alone) change the time it takes, never the result. A folder
    `out` that holds this very merge is left as it is. setting: what names the base, for errors.
    Raises RecipeError when the inputs do not fit or `out` holds something
    else (another merge is replaced where `replace` says so), before anything is written, and when NaN or Inf turns up, with
    nothing left at `out`.
    """
    base, out = Path(base), Path(out)
    given = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    work, odd = prepared(Checkpoint(base, setting), sources, settings, given, chunk or CHUNK)
    notes = [*notes, *odd]
    key = merge_key(work.base, sources, given, settings, CHECKPOINT)
    if (content := earlier(out, key, replace)) is not None:
        try:
            return MergeReport.from_json(content)
        except ValueError:
            if not replace:
                raise RecipeError(DAMAGED) from None
    output = Output(work.mapped, out, work.changed, key, work.dtypes, settings.dtype, replace)
    with output.opened(), one_thread_each(), ThreadPoolExecutor(threads or processors()) as pool:
        fast = fast_path(work, compiled)  # copying has begun: what this imports costs no time then
        if fast and chunk is None:
            work.chunk = COMPILED_CHUNK
        tallies = _stream(work, output, pool, fast, progress)
        tallies = {name: tallies[name] for name in work.changed}
        tensors, cosine = summed_up(tallies, work.places)
        written = written_of(tallies, work.dtypes, work.at_random)
        plain = settings.model_dump(mode="json")
        report = MergeReport(
            rule=settings.rule,
            settings=plain,
            base=name_of(base),
            sources=reports_of(sources, given),
            tensors=tensors,
            cosine=cosine,
            written=written,
            key=key,
            notes=[*notes, *rounding_notes(written)],
        )
        report = output.finish(report)
    return report


def prepared(
    base: Checkpoint, sources: Sequence[Source], settings: RuleSettings, weights: Sequence[float], chunk: int = CHUNK
) -> tuple[Work, list[str]]:
    """The work of a merge, checked, and notes on what is odd. Raises RecipeError for inputs that do not fit."""
    rule = RULES.get(settings.rule)
    notes = check(base, sources, rule, settings, weights)
    moments = [moments_of(source, rule.moments, taking(settings), settings.rule) for source in sources if rule.moments]
    mapped = Mapped(base)
    with one_thread_each(), ThreadPoolExecutor(processors()) as pool:
        names = [changed_names(source, mapped, pool) for source in sources]
    identities = [identity(source, own, mapped) for source, own in zip(sources, names, strict=True)]
    notes += [
        f"{source.label!r} has the base's own weights" for source, own in zip(sources, names, strict=True) if not own
    ]
    order = in_own_order(identities, weights, [source.label for source in sources])
    work = Work(
        mapped=mapped,
        sources=[sources[place] for place in order],
        names=[names[place] for place in order],
        identities=[identities[place] for place in order],
        places=[order.index(place) for place in range(len(sources))],
        weights=[weights[place] for place in order],
        rule=rule,
        settings=settings,
        chunk=chunk,
        moments=[moments[place] for place in order] if moments else [],
    )
    notes += moments_notes(work)
    refuse_idle_rounding(settings.rounding, (work.dtypes[name] for name in work.changed))
    return work, notes


def moments_notes(work: Work) -> list[str]:
    """Which tensors a rule on layers' inputs only averages. Raises RecipeError where a branch has no moments of a tensor."""
    if work.rule.moments is None:
        return []
    if work.rule.moments == "gradients":
        for name in work.changed:
            for each in work.moments:
                each.of(name)
        return []
    apart = frozenset[str]().union(*(each.averaged for each in work.moments))
    for name in work.changed:
        for each in work.moments:
            if name not in apart:
                each.of(name)
    averaged = [name for name in work.changed if name in apart]
    silent = [name for name in work.changed if all(name in each.silent for each in work.moments)]
    told = [(averaged, "no linear layer's own weight"), (silent, "of layers that no row reached")]
    return [
        f"{work.settings.rule}: {len(names)} of {len(work.changed)} tensors are {why}, and are averaged: {names[0]}"
        + (" ..." if len(names) > 1 else "")
        for names, why in told
        if names
    ]


def _stream(
    work: Work, output: Output, pool: ThreadPoolExecutor, fast: Fast | None, progress: Steps
) -> dict[str, Tally]:
    """Statistics, then the merge itself, batch after batch; returns the tally of each tensor."""
    changed = work.changed
    left = [name for name in changed if name not in output.done]
    if work.scope != "tensor" and changed:
        whole = {"": output.facts} if output.facts else statistics(work, {"": changed}, pool, fast)
        output.note_facts(whole[""])
        work.facts = whole
    work.choose_rounding(pool)
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
