"""What does not fit into the memory is done in halves; what is no matter of memory is not."""

import logging
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spunge.errors import RecipeError
from spunge.model.memory import halved, heap_kept, is_out_of_memory, peak_memory

SIZES = [9, 8, 8, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("room", [9, 16, 17, 24, 40, 1000])
def test_every_row_comes_once_in_order_and_no_call_is_repeated_in_vain(
    room: int, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[int] = []

    def call(rows: Sequence[int]) -> list[int]:
        padded = len(rows) * max(SIZES[row] for row in rows)
        if padded > room:
            failed.append(padded)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [SIZES[row] for row in rows]

    with caplog.at_level(logging.WARNING, "spunge"):
        done = list(halved([[0, 1, 2, 3], [4, 5, 6, 7]], SIZES, call, "evaluate"))
    assert [row for rows, _ in done for row in rows] == list(range(8))
    assert [size for _, sizes in done for size in sizes] == SIZES
    assert failed == sorted(set(failed), reverse=True)  # what failed is not tried again
    assert len(caplog.records) == len(failed)


def test_a_single_row_that_does_not_fit_is_refused_in_one_line() -> None:
    def call(rows: Sequence[int]) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
        )

    with pytest.raises(
        RecipeError, match=r"evaluate\.scorer: the memory does not hold the model and a text of 9 tokens"
    ):
        list(halved([[0, 1]], SIZES, call, "evaluate.scorer"))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_memory_is_taken_for_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_another_error_goes_through() -> None:
    def call(rows: Sequence[int]) -> None:
        raise IndexError("index out of range in self")

    with pytest.raises(IndexError):
        list(halved([[0, 1]], SIZES, call, "evaluate"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_memory_that_is_freed_stays_for_the_next_step_and_is_given_back_afterwards() -> None:
    def pages() -> int:
        """New pages that a step of 80 MB takes from the system."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(1 << 20) for _ in range(20)]
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    with heap_kept():
        assert min(pages() for _ in range(5)) < 0.1 * 80 * 2**20 / resource.getpagesize()
    assert resident() < before + 20 * 2**20


def test_the_peak_is_the_processes_own_not_that_of_the_one_that_started_it() -> None:
    held = torch.ones(50 << 20)  # 200 MB
    program = "from spunge.model.memory import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 5e6 < int(child.stdout) < held.nbytes < peak_memory()
