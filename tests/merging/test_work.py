"""What a merge computes side by side."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from spunge.merging.work import in_order, processors


def test_results_come_in_order_and_few_wait() -> None:
    """All chunks' results at once kept the heap of a 70B-shaped merge from the system: 21 GB, and the kernel killed it."""
    made: list[int] = []
    lock = threading.Lock()

    def square(number: int) -> int:
        with lock:
            made.append(number)
        return number * number

    with ThreadPoolExecutor(2) as pool:
        for number, result in enumerate(in_order(pool, square, range(1000))):
            assert result == number * number
            assert len(made) <= number + 4 * processors() + 1
    assert sorted(made) == list(range(1000))


def test_an_error_is_raised_in_its_turn_and_cancels_what_has_not_begun() -> None:
    made: list[int] = []

    def failing(number: int) -> int:
        made.append(number)
        if number == 3:
            raise ValueError("the fourth")
        return number

    with ThreadPoolExecutor(1) as pool:
        results = in_order(pool, failing, range(1000))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the fourth"):
            next(results)
    assert len(made) < 100
