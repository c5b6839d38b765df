"""Whatever others wrote is taken, or refused in one line; `make fuzz` tries more of the same."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzzing.table import TARGETS
from fuzzing.trial import HangError, tried

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", TARGETS)
def test_what_others_wrote_is_taken_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    smallest: list[tuple[int, str]] = []  # hypothesis would print megabytes of the case

    @settings(SETTINGS, max_examples=target.cases)
    @given(target.strategy)
    def every_case(case: object) -> None:
        try:
            tried(target, tmp_path, case)
        except (Exception, HangError) as error:
            shown = repr(case)
            smallest.append((len(shown), f"{type(error).__name__}: {error!s:.300} for {shown:.1000}"))

    every_case()
    assert not smallest, f"{len(smallest)} cases (scripts/fuzz.py --only {name} keeps them); {min(smallest)[1]}"
