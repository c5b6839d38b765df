"""One merge in hand: what goes in, the chunks it is cut into, and what is known about them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from spunge.merging.rule import Chunk, Rule, Scope
from spunge.merging.thresholds import facts_of
from spunge.weights.header import TensorInfo
from spunge.weights.moments import Moments
from spunge.weights.rounding import Arrival, arrival, draws, is_lost, probes, rounds_at_16_bits, stored_dtypes
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

    mapped: Mapped  # the base
    sources: Sequence[Source]
    names: Sequence[frozenset[str]]  # the tensors that each source changes
    identities: Sequence[str]  # what random rules are seeded by, hexadecimal
    places: Sequence[int]  # places[i]: where the user's i-th source stands in `sources`
    weights: Sequence[float]  # in the order of `sources`
    rule: Rule
    settings: Any
    chunk: int  # entries
    facts: Facts = field(default_factory=dict)
    moments: Sequence[Moments] = ()  # of each source, where the rule needs them

    def __post_init__(self) -> None:
        self.base = self.mapped.checkpoint
        self.dtypes = stored_dtypes(self.base, self.settings.dtype)
        self.at_random = self.settings.rounding == "stochastic"  # how sums are rounded to 16 bits
        self.order = tuple(self.places.index(place) for place in range(len(self.sources)))
        self.seeds = tuple(int(identity[:15], 16) for identity in self.identities)
        self.weight_row = torch.tensor(self.weights, dtype=torch.float32)

    @cached_property
    def changed(self) -> list[str]:
        """The tensors that any source changes, or all where the rule changes all, in the base's order."""
        if self.rule.every_tensor:
            return [name for name, info in self.base.tensors.items() if info.dtype.is_floating_point]
        return [name for name in self.base.tensors if any(name in names for names in self.names)]

    @property
    def scope(self) -> Scope:
        return self.rule.scope(self.settings)

    def changes(self, place: int, name: str) -> bool:
        """Whether the source at `place` changes a tensor."""
        return name in self.names[place]

    def population(self, names: Sequence[str]) -> int:
        """How many entries a share is counted over."""
        infos = [self.base.tensors[name] for name in (self.base.tensors if self.scope == "model" else names)]
        return sum(info.numel for info in infos if info.dtype.is_floating_point)

    def entries(self, names: Sequence[str]) -> int:
        return sum(self.base.tensors[name].numel for name in names)

    def seeded_as(self, name: str) -> str:
        """The tensor whose name seeds what is drawn for one: of tied ones, stored twice, the first: they stay tied."""
        return self.base.twins.get(name, name)

    def columns(self, name: str) -> int:
        """Length of a tensor's rows: its last dimension."""
        shape = self.base.tensors[name].shape
        return shape[-1] if shape else 1

    def jobs(self, names: Sequence[str]) -> Iterator[Job]:
        """The chunks of some tensors; whole rows where the rule needs them."""
        for name in names:
            size, step = self.base.tensors[name].numel, self.chunk
            if self.rule.whole_tensors:
                step = max(1, size)
            elif self.rule.whole_rows:
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
        name = self.seeded_as(job.name)
        shape, columns = tuple(self.base.tensors[job.name].shape), self.columns(job.name)
        if job.stop - job.start < self.base.tensors[job.name].numel:  # rows of it, looked at before the merge
            shape = (-1, columns)
        chunk = Chunk(self.weight_row, name, job.start, columns, shape, self.seeds, self.order, base, facts)
        return deltas, self._with_moments(chunk, job)

    def _with_moments(self, chunk: Chunk, job: Job) -> Chunk:
        if self.rule.moments == "gradients":
            own = [each.of(job.name)[job.start : job.stop] for each in self.moments]
            return replace(chunk, moments=own, norms=[each.norm for each in self.moments])
        if self.rule.moments == "inputs" and not any(job.name in each.averaged for each in self.moments):
            own = [each.of(job.name) for each in self.moments]
            return replace(chunk, moments=own, axis=self.moments[0].axis(job.name))
        return chunk

    def drawn(self, job: Job) -> Tensor | None:
        """The draws by which a chunk is rounded; None where it is rounded to the nearest."""
        return draws(self.seeded_as(job.name), job.start, job.stop - job.start) if self.at_random else None

    def choose_rounding(self, pool: ThreadPoolExecutor) -> None:
        """Where it is left to us: at random if nearest would lose more than a tenth of the merged delta."""
        if self.settings.rounding == "auto":
            infos = [self.base.tensors[name] for name in self.changed if rounds_at_16_bits(self.dtypes[name])]
            self.at_random = is_lost(in_order(pool, self._arrival, probes(infos)))

    def _arrival(self, probe: tuple[TensorInfo, int, int]) -> Arrival:
        info, start, stop = probe
        deltas, chunk = self.load(Job(info.name, start, stop))
        if not chunk.facts:  # in scope tensor they are found batch by batch, after this; the probe's own are near
            chunk = replace(chunk, facts=facts_of(self.rule, deltas, self.settings, chunk))
        base = self.base_values(Job(info.name, start, stop))
        merged = self.rule(deltas, self.settings, chunk)
        return arrival(base, merged, (base + merged).to(self.dtypes[info.name]))


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Chunks run side by side, so torch uses one thread in each; this also makes every product round the same way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(pool: ThreadPoolExecutor, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Results in the items' order, a few computed ahead; the first error cancels what has not begun.

    A result that waits between the chunks' large blocks keeps its piece of the heap from the system: of a large tensor's
    chunks that was gigabytes, so no more wait than keep the processors busy.
    """
    ahead = 4 * processors()
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
