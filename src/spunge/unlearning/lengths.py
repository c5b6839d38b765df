"""The most tokens that each of many samples may have: a number for each part, not one for each sample."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, repeat
from typing import NamedTuple, overload


class Run(NamedTuple):
    """Samples that follow each other."""

    tokens: int  # of each, at the most
    samples: int


class Lengths(Sequence[int]):
    """As a list of one number for each sample."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = tuple(run for run in runs if run.samples)
        self._ends = list(accumulate(run.samples for run in self.runs))

    @property
    def longest(self) -> int:
        """What `max` finds by looking at every sample."""
        return max(run.tokens for run in self.runs)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        return self.runs[bisect_right(self._ends, at)].tokens

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(repeat(*run) for run in self.runs)
