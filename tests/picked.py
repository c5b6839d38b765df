"""Which cases of a kind `make test` tries, and which `make test-thorough` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], *tried: int) -> list[Any]:
    """Cases for parametrize: those at the given places, 0 without one, are of both; the rest are thorough."""
    return [
        case if place in (tried or (0,)) else pytest.param(*_values(case), marks=pytest.mark.thorough)
        for place, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
