"""How much memory devices have and how fast they are: some by name, from their makers' data sheets; the one at hand, measured."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spunge.errors import RecipeError, suggestion
from spunge.model.recalled import recalled
from spunge.recipe.model import DeviceMap

GB = 10**9
MATMUL, COPY = 0.7, 0.8  # shares of the data sheet's figures that large products and copies reach (an H200: 0.77, 0.88)
ATTENTION = 0.4  # share of the products' figure
CALL_GPU = 8e-6  # seconds that one operation takes at least: PyTorch's own work for it
CALL_CPU = 6e-6
USABLE = 0.95  # share of a device's memory that a process is given
# Operations a second of a processor that has none for a type and works it out of others: no larger product is faster, and
# many of them take minutes.
EMULATED = 1e10
MEASURED_HOURS = 24  # that what was measured of a processor is taken for


class Rates(NamedTuple):
    """What is reached in one type, not what a data sheet says."""

    products: float  # floating-point operations a second of large products
    attention: float  # the same of attention
    bandwidth: float  # bytes a second of operations entry by entry


@dataclass(frozen=True)
class Device:
    """A processor."""

    name: str
    memory: int  # bytes
    bf16: Rates
    fp32: Rates
    call: float  # seconds of an operation, at least
    source: str
    gpu: bool = True

    def rates(self, dtype: torch.dtype) -> Rates:
        return self.fp32 if dtype == torch.float32 else self.bf16


def _card(name: str, gigabytes: float, bandwidth: float, bf16: float, fp32: float, source: str) -> Device:
    """Of a data sheet: GB, GB/s, dense TFLOP/s of the tensor cores in bf16 and of float32 outside them."""
    return Device(
        name,
        round(gigabytes * GB),
        Rates(MATMUL * bf16 * 1e12, ATTENTION * bf16 * 1e12, COPY * bandwidth * GB),
        Rates(MATMUL * fp32 * 1e12, ATTENTION * fp32 * 1e12, COPY * bandwidth * GB),
        CALL_GPU,
        source,
    )


# bf16 is dense, with float32 accumulation; where a data sheet gives the rate with sparsity, half of it.
CARDS = {
    card.name: card
    for card in (
        _card("h200", 141, 4800, 989, 67, "NVIDIA H200 data sheet, SXM (2024)"),
        _card("h100", 80, 3350, 989, 67, "NVIDIA H100 data sheet, SXM (2022)"),
        _card("a100-80", 80, 2039, 312, 19.5, "NVIDIA A100 data sheet, SXM 80 GB (2021)"),
        _card("a100-40", 40, 1555, 312, 19.5, "NVIDIA A100 data sheet, SXM 40 GB (2020)"),
        _card("l40s", 48, 864, 362, 91.6, "NVIDIA L40S data sheet (2023)"),
        _card("rtx4090", 24, 1008, 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A (2022)"),
        _card("rtx3090", 24, 936, 71, 35.6, "NVIDIA GA102 GPU architecture white paper, appendix A (2020)"),
    )
}


def device_of(name: str, at_hand: torch.device, anew: bool = False) -> Device:
    """auto: the one at hand; cpu: this machine's processor; else a card by its name. anew: what was measured before is not taken.
    Raises RecipeError for another name."""
    if name in CARDS:
        return CARDS[name]
    if name not in ("auto", "cpu"):
        known = ["auto", "cpu", *CARDS]
        raise RecipeError(f"--device: {name!r} is not known{suggestion(name, known)}; give one of {', '.join(known)}")
    if name == "auto" and at_hand.type == "cuda" and torch.cuda.is_available():
        return _card_here(at_hand)
    return _measured_processor() if anew else _processor()


@cache
def _card_here(where: torch.device) -> Device:
    found = torch.cuda.get_device_properties(where)
    bandwidth = _bandwidth(torch.bfloat16, 2**28, 1, where)
    products = [_products(dtype, 8192, 1, where) for dtype in (torch.bfloat16, torch.float32)]
    bf16, fp32 = (Rates(each, 0.5 * each, bandwidth) for each in products)
    return Device(found.name, found.total_memory, bf16, fp32, CALL_GPU, "measured here")


@cache
def _processor() -> Device:
    """As it was measured since the machine was started, in the last hours with as many threads."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return _measured_processor()
    about = ["processor", start, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), machine_memory()]
    known = recalled(about, lambda: asdict(_measured_processor()), days=MEASURED_HOURS / 24)
    return Device(**{**known, "bf16": Rates(*known["bf16"]), "fp32": Rates(*known["fp32"])})


def _measured_processor() -> Device:
    """Measured as training has it: more tensors in turn than the caches hold, every result in memory of its own."""
    where = torch.device("cpu")
    bf16, fp32 = (
        Rates(
            _products(dtype, 1024, 16 // dtype.itemsize, where),
            _attention(dtype, where),
            _bandwidth(dtype, 2**21 // dtype.itemsize, 16, where),
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    return Device("cpu", machine_memory(), bf16, fp32, CALL_CPU, "measured here", gpu=False)


def _products(dtype: torch.dtype, size: int, count: int, where: torch.device) -> float:
    """Operations a second of a layer's product and that of its gradient."""
    if where.type == "cpu" and (rate := _rate(dtype, size // 4, 1, where)) < EMULATED:
        return rate
    return _rate(dtype, size, count, where)


def _rate(dtype: torch.dtype, size: int, count: int, where: torch.device) -> float:
    pairs = [tuple(torch.ones(size, size, dtype=dtype, device=where) for _ in range(2)) for _ in range(count)]
    return 4 * count * size**3 / _shortest(lambda: [(left @ right.t(), left @ right)[0] for left, right in pairs])


def _attention(dtype: torch.dtype, where: torch.device) -> float:
    """The same of causal attention and its gradient."""
    rows, heads, tokens, width = 2, 8, 256, 64
    read = torch.ones(rows, heads, tokens, width, dtype=dtype, device=where, requires_grad=True)

    def both() -> list[Tensor]:
        out = scaled_dot_product_attention(read, read, read, is_causal=True)
        return list(torch.autograd.grad(out.sum(), read))

    return 14 * rows * heads * tokens**2 * width / _shortest(both)


def _bandwidth(dtype: torch.dtype, entries: int, count: int, where: torch.device) -> float:
    """Bytes a second that operations entry by entry read and write."""
    values = [torch.ones(entries, dtype=dtype, device=where) for _ in range(count)]
    return 3 * dtype.itemsize * entries * count / _shortest(lambda: [each * each for each in values])


def _shortest(call: Callable[[], Sequence[Tensor]]) -> float:
    """Seconds; on a processor those that it spends, so that what else the machine does counts less."""
    threads, best = torch.get_num_threads(), math.inf
    for _ in range(3):
        wall, spent = time.perf_counter(), time.process_time()
        result = call()[0]
        float(result.flatten()[0])  # a card is asked for a value, and so waited for
        taken = (time.process_time() - spent) / threads if result.device.type == "cpu" else time.perf_counter() - wall
        best = min(best, taken)
    return best


def machine_memory() -> int:
    """Bytes of the machine's memory, or as many as its control group may have."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total
    return min(total, limit)


class Spread(NamedTuple):
    """The devices that a judged model lies on (`model.device_map`)."""

    devices: int
    room: float  # bytes of a device that weights may take; the others stay in the machine's memory


def spread_over(asked: DeviceMap | None, device: Device) -> Spread | None:
    """None where one device holds all of it. Of cards that are not here, auto is taken to find one."""
    if asked is None or not device.gpu:
        return None
    if asked == "auto":
        return Spread(max(1, torch.cuda.device_count()), math.inf)
    from accelerate.utils import convert_file_size_to_int

    return Spread(len(asked), float(max(map(convert_file_size_to_int, asked.values()))))


def shared(device: Device, processes: int) -> Device:
    """What each of so many processes has of a device."""
    return replace(device, memory=device.memory // processes)
