"""Whatever others wrote is taken, or refused in one line; `make fuzz` tries more of the same."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzzing.table import TARGETS
from fuzzing.trial import tried

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

    @settings(SETTINGS, max_examples=target.cases)
    @given(target.strategy)
    def every_case(case: object) -> None:
        tried(target, tmp_path, case)

    every_case()
