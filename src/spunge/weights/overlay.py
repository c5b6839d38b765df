"""Other values laid over a model's parameters for a while, and the base put back bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, Delta


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
def overlaid(
    parameters: Mapping[str, Tensor], names: Iterable[str], changes: Iterable[tuple[str, Tensor]]
) -> Iterator[None]:
    """Inside the block, the named parameters hold base + change, rounded once; after it, the base again. The changes,
    dense, are asked for one by one, so that they need not be in memory together."""
    with restored(parameters, names) as kept:
        with torch.no_grad():
            for name, change in changes:
                before = kept[name]
                parameters[name].copy_((before.float() + change.to(before.device)).to(before.dtype))
        yield


def moves(parameters: Mapping[str, Tensor], delta: Delta) -> bool:
    """Whether some entry of base + delta differs from the base's once it is rounded to the base's dtype."""
    for name in delta.tensors:
        before = parameters[name].detach()
        after = (before.float() + delta.dense(name).to(before.device)).to(before.dtype)
        if not torch.equal(after, before):
            return True
    return False


@contextmanager
def applied(
    parameters: Mapping[str, Tensor], delta: Delta | Mapping[str, Change], scale: float = 1.0
) -> Iterator[None]:
    """Inside the block, `parameters` (by checkpoint name) hold base + scale * delta; after it, the base again."""
    names = list(delta.tensors if isinstance(delta, Delta) else delta)
    changes = ((name, delta.change(name) if isinstance(delta, Delta) else delta[name]) for name in names)
    dense = ((name, change if isinstance(change, Tensor) else change.dense()) for name, change in changes)
    with overlaid(parameters, names, ((name, scale * change) for name, change in dense)):
        yield


@contextmanager
def swapped(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: list[str]) -> Iterator[None]:
    """Inside the block, the named parameters hold another checkpoint's values; after it, their own again."""
    with restored(parameters, names):
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(checkpoint.read(name))
        yield
