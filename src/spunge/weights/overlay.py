"""Other values laid over a model's parameters for a while, and the base put back bit for bit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, Delta
from spunge.weights.rounding import (
    Arrival,
    Storage,
    arrival,
    draws,
    is_lost,
    narrowed,
    probes,
    rounded,
    rounds_at_16_bits,
    stored_dtypes,
)


@contextmanager
def restored(parameters: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Gives copies of the named parameters' values, and puts them back bit for bit when the block ends."""
    kept = {name: parameters[name].detach().clone() for name in names}
    try:
        yield kept
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                parameters[name].copy_(before)


@contextmanager
def overlaid(parameters: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Inside the block, the parameters named hold these values, in their own dtype; after it, what they held before.

    The values are asked for one by one, so that they need not be in memory together.
    """
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, value in values:
                kept[name] = parameters[name].detach().clone()
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                parameters[name].copy_(before)


@contextmanager
def applied(
    parameters: Mapping[str, Tensor], delta: Delta | Mapping[str, Change], scale: float = 1.0
) -> Iterator[None]:
    """Inside the block, `parameters` (by checkpoint name) hold base + scale * delta in the precision that the model computes
    in; after it, the base again. For training and for choosing: what is judged is `as_written`."""
    names = list(delta.tensors if isinstance(delta, Delta) else delta)
    changes = ((name, delta.change(name) if isinstance(delta, Delta) else delta[name]) for name in names)
    dense = ((name, change if isinstance(change, Tensor) else change.dense()) for name, change in changes)

    def sums() -> Iterator[tuple[str, Tensor]]:
        for name, change in dense:
            before = parameters[name]
            yield name, before.float() + scale * change.to(before.device)

    with overlaid(parameters, sums()):
        yield


@contextmanager
def swapped(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[None]:
    """Inside the block, the named parameters hold another checkpoint's values; after it, their own again."""
    with overlaid(parameters, ((name, checkpoint.read(name)) for name in names)):
        yield


def as_written(
    base: Checkpoint, deltas: Sequence[Delta], storage: Storage, scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of base + scale * deltas, added one after the other, as a checkpoint holds them: by name, in the base's shapes.

    Tensors that no delta changes come too where they take fewer bits than the base has.
    """
    dtypes = stored_dtypes(base, storage.dtype)
    names = [name for name in base.tensors if any(name in delta.tensors for delta in deltas)]

    def looked_at() -> Iterator[Arrival]:
        infos = [base.tensors[name] for name in names if rounds_at_16_bits(dtypes[name])]
        for info, runs in groupby(probes(infos), key=lambda probe: probe[0]):
            plain, changes = _read(base, deltas, info.name, scale)
            change, total = sum(changes[1:], changes[0]).reshape(-1), _added(plain, changes)
            for _, start, stop in runs:
                written = total[start:stop].to(dtypes[info.name])
                yield arrival(plain.reshape(-1)[start:stop], change[start:stop], written)

    at_random = storage.rounding == "stochastic" or (storage.rounding == "auto" and is_lost(looked_at()))
    for name in names:
        plain, changes = _read(base, deltas, name, scale)
        drawn = draws(base.twins.get(name, name), 0, plain.numel()) if at_random else None
        yield name, rounded(_added(plain, changes), dtypes[name], drawn).reshape(plain.shape)
    for name in narrowed(base, dtypes):
        if name not in names:
            yield name, base.read(name).to(dtypes[name])


def _read(base: Checkpoint, deltas: Sequence[Delta], name: str, scale: float) -> tuple[Tensor, list[Tensor]]:
    """A tensor of the base and each delta's change of it, float32."""
    changes = [delta.dense(name) for delta in deltas if name in delta.tensors]
    return base.read(name).float(), changes if scale == 1.0 else [scale * change for change in changes]


def _added(base: Tensor, changes: Sequence[Tensor]) -> Tensor:  # (n,)
    for change in changes:
        base = base + change
    return base.reshape(-1)


def moves(base: Checkpoint, delta: Delta, storage: Storage) -> bool:
    """Whether some entry of base + delta differs from the base's once it is written."""
    return any(not torch.equal(value, base.read(name)) for name, value in as_written(base, [delta], storage))
