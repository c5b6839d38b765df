"""Whatever others wrote is taken, or refused in one line; `make fuzz` tries more of the same."""

import random
from pathlib import Path

import pytest

from fuzzing.table import TARGETS
from fuzzing.trial import HangError, tried


@pytest.mark.thorough
@pytest.mark.parametrize("name", TARGETS)
def test_what_others_wrote_is_taken_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    failures: list[tuple[int, str]] = []  # length of the case, what it ended in
    for number in range(target.cases):
        case = target.make(random.Random(f"{name} {number}"))
        try:
            tried(target, tmp_path, case)
        except (Exception, HangError) as error:
            shown = repr(case)
            failures.append((len(shown), f"{type(error).__name__}: {error!s:.300} for {shown:.1000}"))
    assert not failures, f"{len(failures)} cases (scripts/fuzz.py --only {name} keeps them); {min(failures)[1]}"
