"""Follow a computation on tensors that have shapes and no values: which operations it makes, and how many bytes it holds."""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from spunge.run.planning.devices import Device

VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "detach",
    "slice",
    "unsqueeze",
    "squeeze",
    "alias",
}


@dataclass(frozen=True)
class Operation:
    flops: int  # of matrix products and attention; 0 for everything else
    nbytes: int  # read and written
    dtype: torch.dtype
    attends: bool = False


@dataclass(frozen=True)
class Traced:
    """operations: how often each was made. held: bytes that live on at the mark; peak: at the most."""

    operations: Counter[Operation] = field(default_factory=Counter)
    held: float = 0.0
    peak: float = 0.0

    def seconds(self, device: Device) -> float:
        """An operation takes as long as its arithmetic or its bytes, whichever is more, and no less than a call."""

        def of(each: Operation) -> float:
            rates = device.rates(each.dtype)
            rate = rates.attention if each.attends else rates.products
            return max(each.flops / rate, each.nbytes / rates.bandwidth, device.call)

        return sum(times * of(each) for each, times in self.operations.items())

    def to_json(self) -> dict[str, Any]:
        operations = [
            [each.flops, each.nbytes, str(each.dtype).removeprefix("torch."), each.attends, times]
            for each, times in self.operations.items()
        ]
        return {"operations": operations, "held": self.held, "peak": self.peak}


def read_traced(content: dict[str, Any]) -> Traced:
    """What `Traced.to_json` gave."""
    operations: Counter[Operation] = Counter()
    for flops, nbytes, dtype, attends, times in content["operations"]:
        operations[Operation(flops, nbytes, getattr(torch, dtype), attends)] = times
    return Traced(operations, content["held"], content["peak"])


class Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block every operation is noted. What was there before is not counted as held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[Operation] = Counter()
        self.live = self.peak = self.marked = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if func.namespace != "aten":
            return out
        results, inputs = list(_tensors(out)), list(_tensors((args, kwargs)))
        self._known.update(
            each.untyped_storage() for each in inputs
        )  # what no operation here has made is not held by it
        if name not in VIEWS and results:
            nbytes = sum(each.numel() * each.element_size() for each in (*inputs, *results))
            flops, attends = _flops(packet, args, kwargs or {}, out), "attention" in name
            self.operations[Operation(flops, nbytes, results[0].dtype, attends)] += 1
        for each in results:
            self._hold(each)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, nbytes)

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes

    def mark(self) -> None:
        """What is held now is what the backward pass needs."""
        self.marked = self.live

    @property
    def traced(self) -> Traced:
        return Traced(self.operations, self.marked, self.peak)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if "attention_for_cpu" in packet.__name__:
        backward = "backward" in packet.__name__
        query, key = args[1:3] if backward else args[:2]
        batch, heads, read, width = query.shape
        return int((10 if backward else 4) * batch * heads * read * key.shape[2] * width)
    return 0


def between(low: Traced, high: Traced, depths: tuple[int, int], depth: int) -> Traced:
    """What a model of so many blocks takes, given two depths of the same: each block more costs the same."""
    share = (depth - depths[0]) / (depths[1] - depths[0])
    operations: Counter[Operation] = Counter()
    for each in low.operations | high.operations:
        first, second = low.operations[each], high.operations[each]
        operations[each] = first + (second - first) * share  # type: ignore[assignment]
    ends = ((low.held, high.held), (low.peak, high.peak))
    held, peak = (first + (second - first) * share for first, second in ends)
    return Traced(operations, held, peak)
