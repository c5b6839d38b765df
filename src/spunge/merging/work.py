"""One merge in hand: what goes in, the chunks it is cut into, and what is known about them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from spunge.merging.rule import Chunk, Rule, Scope
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.sources import Mapped, Source

T = TypeVar("T")
Facts = Mapping[str, Mapping[str, Tensor]]  # tensor's name, or "" for all tensors -> the rule's statistics


class Job(NamedTuple):
    """A chunk: entries start..stop of a flattened tensor."""

    name: str
    start: int
    stop: int


@dataclass
class Work:
    """Sources stand in an order that depends on their content alone, so that the user's order changes nothing."""

    base: Checkpoint
    sources: Sequence[Source]
    places: Sequence[int]  # places[i]: where the user's i-th source stands in `sources`
    weights: Sequence[float]  # in the order of `sources`
    rule: Rule
    settings: Any
    chunk: int  # entries
    facts: Facts = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mapped = Mapped(self.base)
        self.order = tuple(self.places.index(place) for place in range(len(self.sources)))
        self.seeds = tuple(int(source.fingerprint[:15], 16) for source in self.sources)
        self.weight_row = torch.tensor(self.weights, dtype=torch.float32)
        self._names = [frozenset(source.names) for source in self.sources]

    @property
    def changed(self) -> list[str]:
        """The tensors that any source changes, in the base's order."""
        return [name for name in self.base.tensors if any(name in names for names in self._names)]

    @property
    def scope(self) -> Scope:
        return self.rule.scope(self.settings)

    def changes(self, place: int, name: str) -> bool:
        """Whether the source at `place` changes a tensor."""
        return name in self._names[place]

    def population(self, names: Sequence[str]) -> int:
        """How many entries a share is counted over."""
        infos = [self.base.tensors[name] for name in (self.base.tensors if self.scope == "model" else names)]
        return sum(info.numel for info in infos if info.dtype.is_floating_point)

    def entries(self, names: Sequence[str]) -> int:
        return sum(self.base.tensors[name].numel for name in names)

    def columns(self, name: str) -> int:
        """Length of a tensor's rows: its last dimension."""
        shape = self.base.tensors[name].shape
        return shape[-1] if shape else 1

    def jobs(self, names: Sequence[str]) -> Iterator[Job]:
        """The chunks of some tensors; whole rows where the rule needs them."""
        for name in names:
            size, step = self.base.tensors[name].numel, self.chunk
            if self.rule.whole_rows:
                columns = max(1, self.columns(name))
                step = max(1, step // columns) * columns
            for start in range(0, size, step):
                yield Job(name, start, min(size, start + step))

    def base_values(self, job: Job) -> Tensor:
        return self.mapped.view(job.name)[job.start : job.stop].float()

    def load(self, job: Job) -> tuple[Tensor, Chunk]:
        """The branches' differences in one chunk, (k, n) float32, and what the rule may know about it."""
        base = self.base_values(job)
        deltas = torch.zeros(len(self.sources), job.stop - job.start)
        for place, source in enumerate(self.sources):
            if self.changes(place, job.name):
                deltas[place] = source.read(job.name, job.start, job.stop, base)
        facts = self.facts.get(job.name) or self.facts.get("", {})
        chunk = Chunk(self.weight_row, job.name, job.start, self.columns(job.name), self.seeds, self.order, base, facts)
        return deltas, chunk


def in_order(pool: ThreadPoolExecutor, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Results in the items' order; the first error cancels what has not begun."""
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
