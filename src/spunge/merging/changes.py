"""Which tensors a model really changes, and what it is told apart by, whether it comes as a checkpoint or as a delta.

A full checkpoint holds every tensor, those that its training never touched too. They count as little as in a delta, which
leaves them out: the same models give the same merge in either form.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from spunge.weights.sources import Mapped, Source, sketch_of_differences

FIRST, LATER = 1 << 12, 1 << 20  # entries that are compared at once: of most tensors the first ones tell


def changed_names(source: Source, base: Mapped, pool: ThreadPoolExecutor) -> frozenset[str]:
    """The tensors of which a source changes an entry, among those that it has."""
    names = list(source.names)
    differs = pool.map(lambda name: _differs(source, name, base.view(name)), names)
    return frozenset(name for name, different in zip(names, differs, strict=True) if different)


def _differs(source: Source, name: str, base: Tensor) -> bool:
    """Whether any entry does. NaN differs from everything, so that the merge meets it and says so."""
    start, size, own = 0, base.numel(), source.raw(name)
    while start < size:
        stop = min(size, start + (LATER if start else FIRST))
        plain = base[start:stop]
        if own is not None and own.dtype == base.dtype:
            different = not torch.equal(own[start:stop], plain)
        else:
            different = bool(source.read(name, start, stop, plain.float()).any())
        if different:
            return True
        start = stop
    return False


def identity(source: Source, names: Collection[str], base: Mapped) -> str:
    """What orders the sources and seeds random rules: the fingerprint, of a whole model that of its delta."""
    if not names or source.raw(next(iter(names))) is None:
        return source.fingerprint

    def difference(name: str, first: int, last: int) -> Tensor:
        return source.read(name, first, last, base.view(name)[first:last].float())

    return sketch_of_differences({name: source.shape(name) for name in names}, difference)


def in_own_order(identities: Sequence[str], weights: Sequence[float], labels: Sequence[str]) -> list[int]:
    """Places of the sources in an order that depends on their content alone."""
    return sorted(range(len(identities)), key=lambda place: (identities[place], weights[place], labels[place]))
