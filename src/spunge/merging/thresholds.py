"""Exact magnitude thresholds over a stream that fits in no memory.

The bits of a non-negative float32, read as an integer, are in the order of its value: that integer is its key. To
find the key of the entry of a given rank, a pass counts the keys above a bracket and lists those inside it, or bins
them where they are many; the bracket shrinks to the key or the bin, and passes repeat until it holds one key. A sample
makes the first bracket so small that one pass is the rule; a sample that misleads costs another pass, never a wrong
threshold. Counts add up across chunks and tensors in any order, so nothing depends on how the work is cut up.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spunge.merging.rule import Chunk, Cut, Rule

TOP = 0x7FFFFFFF  # the largest key; +inf is 0x7F800000
BITS = 18  # a bracket is divided into at most 2**18 bins
LISTED = 1 << 21  # as many keys in a bracket are kept as they are; more are binned
MARGIN = 4.0  # the bracket reaches so many standard errors of the sample's rank to each side


def keys_of(values: Tensor) -> Tensor:
    """float32 >= 0 -> int32 keys in the same order; -0.0 counts as 0."""
    return values.abs().view(torch.int32)


def value_of(key: int) -> float:
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def rank_of(share: float, population: int, least: int = 1) -> int:
    """How many entries a share keeps: mergekit's and PEFT's int(share * n), at least `least` for a share above 0."""
    return max(least, int(share * population)) if share > 0 else 0


class Bracket:
    """Where the key of one rank is looked for: low <= key <= high. Ranks count from the largest entry, from 1."""

    def __init__(self, rank: int, population: int, low: int = 0, high: int = TOP) -> None:
        self.rank, self.population, self.low, self.high = rank, population, low, high
        self._restart()

    def _restart(self) -> None:
        self.above = 0  # entries seen in this pass with a key above the bracket
        self.shift = max(0, (self.high - self.low).bit_length() - BITS)
        # The keys in the bracket themselves, while they are few: a copy, since a view would hold the whole chunk.
        self.inside: Tensor | None = None
        self.listed = 0  # so many of them
        self.bins: Tensor | None = None  # else a histogram of them

    @property
    def found(self) -> bool:
        return self.low == self.high

    @property
    def threshold(self) -> float:
        """The value to reach; inf for rank 0."""
        return float("inf") if self.rank == 0 else value_of(self.low)

    def split(self, keys: Tensor) -> tuple[int, Tensor]:
        """How many of a chunk's keys lie above the bracket, and those inside it."""
        return int(torch.count_nonzero(keys > self.high)), keys[(keys >= self.low) & (keys <= self.high)].cpu()

    def add(self, above: int, inside: Tensor) -> None:
        """Take in what `split` found; the caller holds a lock."""
        self.above += above
        if self.bins is None and self.listed + inside.numel() > LISTED:
            self.bins = torch.zeros(((self.high - self.low) >> self.shift) + 1, dtype=torch.int64)
            self._bin(self._list())
            self.inside = None
        if self.bins is not None:
            self._bin(inside)
            return
        if self.inside is None:
            self.inside = torch.empty(LISTED, dtype=inside.dtype)
        self.inside[self.listed : self.listed + inside.numel()] = inside
        self.listed += inside.numel()

    def _list(self) -> Tensor:
        return torch.empty(0, dtype=torch.int32) if self.inside is None else self.inside[: self.listed]

    def _bin(self, keys: Tensor) -> None:
        assert self.bins is not None
        places = (keys - self.low) >> self.shift
        self.bins.index_add_(0, places, torch.ones((), dtype=torch.int64).expand(places.numel()))

    def narrow(self) -> None:
        """End a pass: keep what holds the rank, or look above or below where the bracket missed it."""
        if self.found:
            return
        inside = self.listed if self.bins is None else int(self.bins.sum())
        if self.above >= self.rank:
            self.low, self.high = self.high + 1, TOP
        elif self.above + inside < self.rank:
            # Where nothing lies below, the rank falls among the zeros that nobody streams: everything is kept.
            self.low, self.high = 0, max(0, self.low - 1)
        elif self.bins is None:
            place = inside - (self.rank - self.above)
            self.low = self.high = int(np.partition(self._list().numpy(), place)[place])
        else:
            from_top = self.above + self.bins.flip(0).cumsum(0)
            place = self.bins.numel() - 1 - int(torch.searchsorted(from_top, self.rank))
            self.low += place << self.shift
            self.high = min(self.high, self.low + (1 << self.shift) - 1)
        self._restart()


def guess(rank: int, population: int, sample: Tensor) -> Bracket:
    """The first bracket: `sample` holds int32 keys of the population, all of them where it is as large."""
    size = sample.numel()
    if rank >= population:
        return Bracket(rank, population, 0, 0)
    if rank == 0:
        return Bracket(rank, population, TOP, TOP)
    if not size:
        return Bracket(rank, population)
    keys = sample.cpu().numpy()
    if size >= population:
        key = int(np.partition(keys, size - rank)[size - rank])
        return Bracket(rank, population, key, key)
    share = rank / population
    middle, slack = share * size, MARGIN * (share * (1 - share) * size) ** 0.5 + 1
    first, last = int(middle - slack), int(middle + slack) + 1  # ranks in the sample
    low = 0
    if last <= size:
        keys = np.partition(keys, size - last)[size - last :]  # one place at a time is far faster than two at once
        low = int(keys[0])
    return Bracket(rank, population, low, int(np.partition(keys, -first)[-first]) if first >= 1 else TOP)


def facts_of(rule: Rule, deltas: Tensor, settings: object, chunk: Chunk) -> dict[str, Tensor]:
    """A rule's statistics on deltas (k, n) held in memory, by plain sorting."""
    facts: dict[str, Tensor] = {}
    for wanted in rule.wanted(settings, deltas.shape[0]):
        rows = wanted.measure(deltas, settings, replace(chunk, facts=facts))
        if not isinstance(wanted, Cut):
            facts[wanted.name] = rows.double().sum(dim=1)
            continue
        places = chunk.order if wanted.per_branch and chunk.order else range(len(wanted.shares))
        population = int(facts[wanted.population]) if wanted.population else rows.shape[1]
        ranks = [rank_of(wanted.shares[place], population, wanted.least) for place in places]
        cuts = [_largest(row, rank) for row, rank in zip(rows, ranks, strict=True)]
        facts[wanted.name] = torch.tensor(cuts, device=deltas.device)
    return facts


def _largest(row: Tensor, rank: int) -> float:
    """The value of the given rank from the top; inf for rank 0."""
    if rank == 0:
        return float("inf")
    return float(row.sort(descending=True).values[rank - 1]) if rank < row.numel() else 0.0
