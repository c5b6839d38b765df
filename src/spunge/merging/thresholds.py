"""Exact magnitude thresholds over a stream that fits in no memory.

The bits of a non-negative float32, read as an integer, are in the order of its value: that integer is its key. To find the
key of the entry of a given rank, a pass counts the keys above a bracket and histograms those inside it; the bracket shrinks
to one bin and the pass repeats until it holds one key. A sample makes the first bracket small, so that one pass is the rule;
a sample that misleads costs another pass, never a wrong threshold. Counts add up across chunks and tensors in any order.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spunge.merging.rule import Chunk, Cut, Rule

TOP = 0x7FFFFFFF  # the largest key; +inf is 0x7F800000
BITS = 18  # a bracket is divided into at most 2**18 bins
MARGIN = 5.0  # the bracket reaches so many standard errors of the sample's rank to each side


def keys_of(values: Tensor) -> Tensor:
    """float32 >= 0 -> int32 keys in the same order. -0.0 counts as 0."""
    return values.abs().view(torch.int32)


def value_of(key: int) -> float:
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def rank_of(share: float, population: int) -> int:
    """How many entries a share keeps: mergekit's and PEFT's int(share * n), but at least one for any share above 0."""
    return max(1, int(share * population)) if share > 0 else 0


@dataclass
class Bracket:
    """Where the key of one rank is looked for: low <= key <= high."""

    rank: int  # the entry's place counted from the largest, from 1
    low: int = 0
    high: int = TOP
    above: int = 0  # entries seen in this pass with a key above the bracket
    bins: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        self._restart()

    @property
    def shift(self) -> int:
        return max(0, (self.high - self.low).bit_length() - BITS)

    @property
    def found(self) -> bool:
        return self.low == self.high

    @property
    def threshold(self) -> float:
        return value_of(self.low)

    def _restart(self) -> None:
        self.above = 0
        size = 0 if self.found else ((self.high - self.low) >> self.shift) + 1
        self.bins = torch.zeros(size, dtype=torch.int64)

    def add(self, keys: Tensor) -> tuple[int, Tensor]:
        """What one chunk adds: the count above, and the bin of each key inside. Safe to call from any thread."""
        inside = keys[(keys >= self.low) & (keys <= self.high)]
        return int((keys > self.high).sum()), ((inside - self.low) >> self.shift).long().cpu()

    def collect(self, above: int, places: Tensor) -> None:
        """Take in what `add` returned; the caller holds a lock."""
        self.above += above
        self.bins.index_add_(0, places, torch.ones_like(places))

    def narrow(self) -> None:
        """End a pass: keep the bin that holds the rank, or look above or below where the bracket missed it."""
        if self.found:
            return
        inside = int(self.bins.sum())
        if self.above >= self.rank:
            self.low, self.high = self.high + 1, TOP
        elif self.above + inside < self.rank:
            # Entries that nobody streams are zeros: their key is 0.
            self.low, self.high = (0, max(0, self.low - 1)) if self.low else (0, 0)
        else:
            from_top = self.above + self.bins.flip(0).cumsum(0)
            place = self.bins.numel() - 1 - int(torch.searchsorted(from_top, self.rank))
            low = self.low + (place << self.shift)
            self.low, self.high = low, min(self.high, low + (1 << self.shift) - 1)
        self._restart()


def bracket(rank: int, population: int, sample: Tensor | None = None) -> Bracket:
    """A bracket for one rank; `sample` holds keys drawn from the population, all of them where it is as large."""
    if rank >= population:
        return Bracket(rank, 0, 0)
    if rank == 0:
        return Bracket(rank, TOP, TOP)
    if sample is None or not sample.numel():
        return Bracket(rank)
    ordered = sample.sort(descending=True).values
    size = ordered.numel()
    if size >= population:
        key = int(ordered[rank - 1])
        return Bracket(rank, key, key)
    share = rank / population
    middle, slack = share * size, MARGIN * (share * (1 - share) * size) ** 0.5 + 1
    first, last = int(middle - slack), int(middle + slack) + 1
    return Bracket(rank, int(ordered[last]) if last < size else 0, int(ordered[first]) if first >= 0 else TOP)


def facts_of(rule: Rule, deltas: Tensor, settings: object, chunk: Chunk) -> dict[str, Tensor]:
    """A rule's statistics on deltas (k, n) held in memory, by plain sorting."""
    facts: dict[str, Tensor] = {}
    for wanted in rule.wanted(settings, deltas.shape[0]):
        rows = wanted.measure(deltas, settings, replace(chunk, facts=facts))
        if not isinstance(wanted, Cut):
            facts[wanted.name] = rows.double().sum(dim=1)
            continue
        given = chunk.per_branch(wanted.shares).tolist() if wanted.per_branch else wanted.shares
        cuts = [_largest(row, rank_of(share, row.numel())) for row, share in zip(rows, given, strict=True)]
        facts[wanted.name] = torch.tensor(cuts, device=deltas.device)
    return facts


def _largest(row: Tensor, rank: int) -> float:
    """The value of the given rank from the top; inf for rank 0."""
    if rank == 0:
        return float("inf")
    return float(row.sort(descending=True).values[rank - 1]) if rank < row.numel() else 0.0
