"""What a rule must know before it merges: exact thresholds and sums over a tensor, the changed tensors or the model."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from spunge.merging.fast.compiled import Fast
from spunge.merging.rule import Cut, Statistic, magnitude
from spunge.merging.thresholds import Bracket, guess, keys_of, rank_of
from spunge.merging.work import Job, Work, in_order

RUN = 1 << 9  # entries of a sample that lie side by side
SAMPLE = 1 << 16, 1 << 20  # least and most entries that are looked at to guess a threshold, and
PART = 16  # one in so many between them: looking at more costs more than the shorter lists of candidates save

Groups = Mapping[str, Sequence[str]]  # group -> its tensors


def statistics(work: Work, groups: Groups, pool: ThreadPoolExecutor, fast: Fast | None) -> dict[str, dict[str, Tensor]]:
    """The rule's statistics for each group of tensors; a later one may use those before it. Sets work.facts."""
    by_group: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    work.facts = by_group
    for wanted in work.rule.wanted(work.settings, len(work.sources)):
        if isinstance(wanted, Cut):
            results = _cuts(work, groups, wanted, pool, fast if wanted.measure is magnitude else None)
        else:
            results = _sums(work, groups, wanted, pool)
        for group, fact in results.items():
            by_group[group][wanted.name] = fact
    return by_group


def _measured(work: Work, wanted: Statistic, job: Job) -> Tensor:  # (rows, n)
    deltas, chunk = work.load(job)
    return wanted.measure(deltas, work.settings, chunk)


def _sums(work: Work, groups: Groups, wanted: Statistic, pool: ThreadPoolExecutor) -> dict[str, Tensor]:
    def part(job: Job) -> list[float]:  # no tensor that would stay in the heap between the chunks
        return _measured(work, wanted, job).double().sum(dim=1).tolist()

    totals: dict[str, Tensor] = {}
    for group, names in groups.items():
        parts = list(in_order(pool, part, list(work.jobs(names))))
        totals[group] = torch.tensor(parts, dtype=torch.float64).sum(dim=0)
    return totals


def _cuts(work: Work, groups: Groups, wanted: Cut, pool: ThreadPoolExecutor, fast: Fast | None) -> dict[str, Tensor]:
    """One pass counts for all groups that are not settled yet; most need just one."""
    group_of = {name: group for group, names in groups.items() for name in names}
    first = in_order(pool, lambda group: _first_brackets(work, group, groups[group], wanted, fast), list(groups))
    brackets = dict(zip(groups, first, strict=True))
    lock = threading.Lock()

    def count(job: Job) -> None:
        rows = brackets[group_of[job.name]]
        keys = None if fast else keys_of(_measured(work, wanted, job))
        for place, row in enumerate(rows):
            if row.found:
                continue
            above, inside = fast.split(job, place, row) if fast else row.split(keys[place])  # type: ignore[index]
            with lock:
                row.add(above, inside)

    while unsettled := [group for group, rows in brackets.items() if not all(row.found for row in rows)]:
        for _ in in_order(pool, count, [job for group in unsettled for job in work.jobs(groups[group])]):
            pass
        for group in unsettled:
            for row in brackets[group]:
                row.narrow()
    return {group: torch.tensor([row.threshold for row in rows]) for group, rows in brackets.items()}


def _first_brackets(work: Work, group: str, names: Sequence[str], wanted: Cut, fast: Fast | None) -> list[Bracket]:
    """Brackets guessed from runs of entries spread over the tensors."""
    shares = [wanted.shares[place] for place in work.order] if wanted.per_branch else wanted.shares
    counted = int(work.facts[group][wanted.population]) if wanted.population else work.population(names)
    ranks = [rank_of(share, counted, wanted.least) for share in shares]
    total = work.entries(names)
    if not any(0 < rank < total for rank in ranks):
        return [guess(rank, total, torch.empty(0)) for rank in ranks]
    if total <= SAMPLE[0]:
        parts = [keys_of(_measured(work, wanted, job)) for job in work.jobs(names)]
    elif fast:
        parts = [fast.sample(name, starts, run) for name, starts, run in _runs(work, names, total)]
    else:
        jobs = [Job(name, at, at + run) for name, starts, run in _runs(work, names, total) for at in starts]
        parts = [keys_of(_measured(work, wanted, job)) for job in jobs]
    sample = torch.cat(parts, dim=1)
    # Entries outside the stream are zeros: a rank that reaches them keeps everything.
    return [guess(rank, total, row) for rank, row in zip(ranks, sample, strict=True)]


def _runs(work: Work, names: Sequence[str], total: int) -> Iterator[tuple[str, list[int], int]]:
    """Where runs of about RUN entries begin, spread evenly over the tensors, and how long they are: whole rows where the rule
    needs them."""
    runs = min(max(SAMPLE[0], total // PART), SAMPLE[1]) // RUN
    for name in names:
        size, row = work.base.tensors[name].numel, max(1, work.columns(name)) if work.rule.whole_rows else 1
        if size >= RUN:
            run = max(1, RUN // row) * row
            step = max(run, size // max(1, round(runs * size / total)) // row * row)
            yield name, list(range(0, size - run + 1, step)), run
