"""Out of memory: which errors say so, and halving what does not fit; and keeping the heap from step to step."""

import ctypes
import logging
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spunge.errors import RecipeError, one_line

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

TRIM, MAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
SMALL = 1 << 20  # bytes: blocks up to here may stay with the process in any case
LARGEST = 32 << 20  # bytes: larger blocks are the system's own in any case


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, does not suffice."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def release() -> None:
    """Give back what torch keeps of a device's memory for later."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


@contextmanager
def heap_kept() -> Iterator[None]:
    """Inside the block, blocks of up to 32 MB that are freed stay with the process, for the next step's tensors.

    glibc would give them back to the system after each step, which has to clear every page anew at the next: a tenth of a step's
    time and more on a CPU. Afterwards it goes by the limits that it would have come to itself. Nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MAP, LARGEST)
    libc.mallopt(TRIM, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM, 2 * LARGEST)
        libc.malloc_trim(0)


@contextmanager
def heap_given_back() -> Iterator[None]:
    """Inside the block, blocks of more than 1 MB that are freed go back to the system at once.

    Where a model is shared out, each part of it is whole for a moment. glibc would keep these moments' memory in pieces that fit
    nothing else, as much as the whole model takes and more. Nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(MAP, SMALL)
    try:
        yield
    finally:
        libc.mallopt(MAP, LARGEST)


def peak_memory() -> int:
    """Bytes of the machine's memory that this process has held at the most.

    getrusage alone would not do on Linux: a process that another one starts begins there with what that one held.
    """
    return _of_process("VmHWM:")


def held_memory(device: "torch.device | None") -> int:
    """Bytes that this process holds now: of a GPU's memory where its model is on one, else of the machine's (where the system does
    not tell that, the peak)."""
    import torch

    if device is not None and device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return _of_process("VmRSS:")


def _of_process(line: str) -> int:
    """Bytes, from a line of what Linux tells of a process; elsewhere the peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(each.split()[1]) * 1024 for each in lines if each.startswith(line))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tell(said: str) -> None:
    """A line about memory, at once."""
    logging.getLogger("spunge").warning(one_line(said))


def halved(
    groups: Iterable[Sequence[int]], sizes: Sequence[int], call: Callable[[Sequence[int]], R], setting: str
) -> Iterator[tuple[Sequence[int], R]]:
    """Each group of rows with what `call` gives for it; a group that does not fit into the memory is called in halves, and later
    ones are kept as small.

    sizes: tokens of each row. setting: the recipe's key that is named where even a single row does not fit; then RecipeError.
    """
    halves = halving(sizes, call, setting)
    for group in groups:
        yield from halves(group)


def halving(
    sizes: Sequence[int], call: Callable[[Sequence[int]], R], setting: str
) -> Callable[[Sequence[int]], Iterator[tuple[Sequence[int], R]]]:
    """`halved` of one group after the other, whichever comes next."""
    most = float("inf")  # padded tokens of a group

    def halves(group: Sequence[int]) -> Iterator[tuple[Sequence[int], R]]:
        nonlocal most
        waiting = [group]
        while waiting:
            rows = waiting.pop(0)
            padded = len(rows) * max(sizes[row] for row in rows)
            if padded <= most or len(rows) == 1:
                result = _attempted(call, rows)
                if result is not None:
                    yield rows, result[0]
                    continue
                release()
                if len(rows) == 1:
                    raise RecipeError(
                        f"{setting}: the memory does not hold the model and a text of {padded} tokens; give another device, a "
                        "smaller dtype or shorter texts"
                    )
                most = padded / 2
                tell(f"{setting}: out of memory with {len(rows)} texts at once; now {(len(rows) + 1) // 2}")
            middle = (len(rows) + 1) // 2
            waiting[:0] = [rows[:middle], rows[middle:]]

    return halves


def _attempted(call: Callable[[Sequence[int]], R], rows: Sequence[int]) -> tuple[R] | None:
    """The result; None where memory does not suffice. Its own function, so that no traceback holds what did not fit."""
    try:
        return (call(rows),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
