"""Base + change, rounded once to what a checkpoint stores.

`nearest`: a change below half a step of the dtype is gone, entry by entry, and of a small change that is most of it.
`stochastic`: an entry goes to one of its two neighbours, to each with the probability that keeps its mean, so that small
changes survive in sums over many entries (Gupta et al. 2015, arXiv:1502.02551). The draws are a hash of the tensor's name
and the entry's place: the same in every run, however the work is cut up, whatever was merged and in which form.
`auto`, tensor by tensor: nearest, or stochastic where nearest would leave most of the changed entries as they were.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from spunge.weights.checkpoint import Checkpoint, TensorInfo

Rounding = Literal["auto", "nearest", "stochastic"]

DRAW = 24  # bits of a draw
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 that the dtype has no room for
_RUNS, _RUN = 8, 2048  # where `auto` looks: so many runs of entries, each about so long


def stored_dtypes(base: Checkpoint, wanted: str) -> dict[str, torch.dtype]:
    """The dtype in which each tensor of a merged checkpoint is written. wanted: base, or a dtype's name.

    Tensors in the dtype of most entries take the wanted one. Those that the base keeps wider than the rest, as some
    architectures need for a few, stay as they are, and so do integers.
    """
    if wanted == "base":
        return {name: info.dtype for name, info in base.tensors.items()}
    target: torch.dtype = getattr(torch, wanted)
    main = main_dtype(base)
    return {
        name: target if _takes(info.dtype, main, target) else info.dtype for name, info in base.tensors.items()
    }


def main_dtype(base: Checkpoint) -> torch.dtype:
    """The floating dtype that most entries of a checkpoint are stored in."""
    entries: dict[torch.dtype, int] = {}
    for info in base.tensors.values():
        if info.dtype.is_floating_point:
            entries[info.dtype] = entries.get(info.dtype, 0) + info.numel
    return max(entries, key=lambda dtype: entries[dtype], default=torch.float32)


def _takes(dtype: torch.dtype, main: torch.dtype, target: torch.dtype) -> bool:
    return dtype.is_floating_point and (dtype == main or dtype.itemsize < target.itemsize)


def hashed(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, which wraps; >> is arithmetic, so its copies are masked off."""
    x = x * wrapped(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * wrapped(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def wrapped(value: int) -> int:
    """A Python integer wrapped to int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def seed_of(name: str) -> int:
    """A tensor's own seed, int64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def draws(name: str, start: int, count: int) -> Tensor:  # (count,) int32
    """Numbers in [0, 2**DRAW) for the entries from `start` on of a flattened tensor."""
    places = torch.arange(start, start + count) + seed_of(name)
    return (hashed(places) & ((1 << DRAW) - 1)).int()


def rounded(values: Tensor, dtype: torch.dtype, drawn: Tensor | None = None) -> Tensor:
    """float32 -> dtype, to the nearest; with draws, up or down at random where the dtype is a 16-bit one."""
    if drawn is None or dtype not in _DROPPED:
        return values.to(dtype)
    bits, dropped = values.view(torch.int32), _DROPPED[dtype]
    mask = (1 << dropped) - 1
    up = ((bits & mask) << (DRAW - dropped)) + drawn >= 1 << DRAW
    result = ((bits & ~mask) + (up.int() << dropped)).view(torch.float32)
    if dtype == torch.float16:  # below its normal numbers the step no longer shrinks
        steps = values.abs() * 2.0**24
        up = ((steps - steps.floor()) * 2.0**DRAW).int() + drawn >= 1 << DRAW
        small = torch.copysign((steps.floor() + up) * 2.0**-24, values)
        result = torch.where(values.abs() < 2.0**-14, small, result)
    return torch.where(values.isfinite(), result, values).to(dtype)


def probes(info: TensorInfo) -> list[tuple[int, int]]:
    """Where `auto` looks in a tensor: runs of whole rows, (start, stop) in the flattened tensor, spread evenly over it."""
    columns = max(1, info.shape[-1] if info.shape else 1)
    rows, each = info.numel // columns, max(1, _RUN // columns)
    if rows <= _RUNS * each:
        return [(0, info.numel)]
    return [(row * columns, (row + each) * columns) for row in range(0, rows - each + 1, (rows - each) // (_RUNS - 1))]


def counts(base: Tensor, change: Tensor, written: Tensor) -> tuple[int, int]:
    """Of (n,) entries: how many change, and how many of these are written as the base has them."""
    changed = change != 0
    return int(changed.sum()), int((changed & (written.float() == base)).sum())


def mostly_stays(pieces: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> bool:
    """Whether nearest would leave most changed entries as they were; pieces: the probes' (base, change), float32."""
    changed = stayed = 0
    for base, change in pieces:
        found = counts(base, change, (base + change).to(dtype))
        changed, stayed = changed + found[0], stayed + found[1]
    return 2 * stayed > changed


def rounds(rounding: Rounding, dtype: torch.dtype) -> Rounding:
    """How a tensor of a dtype is rounded: what is not 16 bits wide takes float32's sums as they are."""
    return rounding if dtype in _DROPPED else "nearest"


def written(base: Tensor, change: Tensor, info: TensorInfo, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    """What a checkpoint holds of base + change: whole tensors in the base's shape, the change in float32."""
    flat, moved = base.reshape(-1).float(), change.reshape(-1)
    choice = rounds(rounding, dtype)
    if choice == "auto":
        pieces = ((flat[start:stop], moved[start:stop]) for start, stop in probes(info))
        choice = "stochastic" if mostly_stays(pieces, dtype) else "nearest"
    drawn = draws(info.name, 0, flat.numel()) if choice == "stochastic" else None
    return rounded(flat + moved, dtype, drawn).reshape(base.shape)


def narrowed(base: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The tensors that are written in fewer bits than the base has, and so change even where nothing is merged."""
    return [name for name, info in base.tensors.items() if dtypes[name] != info.dtype and dtypes[name].itemsize <= 2]
