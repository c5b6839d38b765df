"""Base + change, rounded once to what a checkpoint stores.

`nearest`: a change below half a step of the dtype is gone, entry by entry, and of a small change that is most of it.
`stochastic`: an entry goes to one of its two neighbours, to each with the probability that keeps its mean, so that small
changes survive in sums over many entries (Gupta et al. 2015, arXiv:1502.02551). The draws are a hash of the tensor's name
and the entry's place: the same in every run, however the work is cut up, whatever was merged and in which form.
`auto`: stochastic where nearest would lose more than a tenth of the change, as a sample of its entries tells; else nearest.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.header import TensorInfo

Rounding = Literal["auto", "nearest", "stochastic"]


class Storage(NamedTuple):
    """What a checkpoint is written in."""

    dtype: str = "base"  # the base's own, or a dtype's name
    rounding: Rounding = "auto"


DRAW = 24  # bits of a draw
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 that the dtype has no room for
KEPT = 0.9  # share of a change, along its own direction, that `auto` wants to arrive
_LOOKED_AT, _RUN = 1 << 18, 1 << 11  # entries that `auto` looks at, and how many of them lie side by side


def stored_dtypes(base: Checkpoint, wanted: str) -> dict[str, torch.dtype]:
    """The dtype in which each tensor of a merged checkpoint is written. wanted: base, or a dtype's name.

    Tensors in the dtype of most entries take the wanted one. Those that the base keeps wider than the rest, as some
    architectures need for a few, stay as they are, and so do integers.
    """
    if wanted == "base":
        return {name: info.dtype for name, info in base.tensors.items()}
    target: torch.dtype = getattr(torch, wanted)
    main = main_dtype(base)
    return {name: target if _takes(info.dtype, main, target) else info.dtype for name, info in base.tensors.items()}


def main_dtype(base: Checkpoint) -> torch.dtype:
    """The floating dtype that most entries of a checkpoint are stored in."""
    entries: dict[torch.dtype, int] = {}
    for info in base.tensors.values():
        if info.dtype.is_floating_point:
            entries[info.dtype] = entries.get(info.dtype, 0) + info.numel
    return max(entries, key=lambda dtype: entries[dtype], default=torch.float32)


def written_bytes(base: Checkpoint, wanted: str) -> int:
    """Size of a merged checkpoint's tensors. wanted: base, or a dtype's name."""
    return sum(base.tensors[name].numel * dtype.itemsize for name, dtype in stored_dtypes(base, wanted).items())


def written_dtype(base: Checkpoint, wanted: str) -> torch.dtype:
    """The dtype that most entries of a merged checkpoint are written in. wanted: base, or a dtype's name."""
    if wanted == "base":
        return main_dtype(base)
    chosen: torch.dtype = getattr(torch, wanted)
    return chosen


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
    if dtype.itemsize == 1:  # most 8-bit floats have no infinity, and torch would write their largest number
        values = torch.where(values.abs() <= torch.finfo(dtype).max, values, torch.nan)
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


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite. torch cannot tell it of some 8-bit floats."""
    return bool(torch.isfinite(values.float() if values.dtype.itemsize == 1 else values).all())


def refuse_idle_rounding(rounding: Rounding, dtypes: Iterable[torch.dtype]) -> None:
    """Raises RecipeError for rounding at random of what is written in dtypes that nothing is rounded to."""
    kinds = list(dict.fromkeys(dtypes))
    if rounding == "stochastic" and kinds and not any(map(rounds_at_16_bits, kinds)):
        names = " and ".join(str(each).removeprefix("torch.") for each in kinds)
        raise RecipeError(
            f"merge.rounding: stochastic rounds to 16 bits, and what is merged is written in {names}; leave it out, or set "
            "merge.dtype=bfloat16"
        )


def rounds_at_16_bits(dtype: torch.dtype) -> bool:
    """Whether the two ways of rounding differ: float32's sums are written in float32 as they are."""
    return dtype in _DROPPED


def probes(infos: Sequence[TensorInfo]) -> list[tuple[TensorInfo, int, int]]:
    """Where `auto` looks: runs of whole rows, (tensor, start, stop) of its entries, spread evenly over some tensors."""
    total = sum(info.numel for info in infos)
    runs = []
    for info in infos:
        columns = max(1, info.shape[-1] if info.shape else 1)
        rows, each = info.numel // columns, max(1, _RUN // columns)
        count = max(1, _LOOKED_AT * info.numel // (max(1, total) * each * columns))
        if total <= _LOOKED_AT or rows <= count * each:
            runs.append((info, 0, info.numel))
            continue
        step = max(1, (rows - each) // max(1, count - 1))
        runs += [(info, row * columns, (row + each) * columns) for row in range(0, rows - each + 1, step)[:count]]
    return runs


class Arrival(NamedTuple):
    """How much of a change rounding leaves, summed over entries."""

    along: float  # inner product of the written change with the change
    squares: float  # the change's squared norm


def arrival(base: Tensor, change: Tensor, written: Tensor) -> Arrival:
    """(n,) each, base and change in float32."""
    wide = change.double()
    return Arrival(float((written.double() - base.double()).dot(wide)), float(wide.dot(wide)))


def is_lost(arrivals: Iterable[Arrival]) -> bool:
    """Whether more than a tenth of a change is lost, by what arrives of its parts."""
    parts = list(arrivals)
    return sum(part.along for part in parts) < KEPT * sum(part.squares for part in parts)


def narrowed(base: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The tensors that are written in fewer bits than the base has, and so change even where nothing is merged."""
    return [name for name, info in base.tensors.items() if dtypes[name] != info.dtype and dtypes[name].itemsize <= 2]
