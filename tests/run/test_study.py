"""What a search draws next: several trials at once, and the same where it was stopped."""

from pathlib import Path
from typing import Any

import pytest

from spunge.recipe.ranges import Among, Between, Searched
from spunge.run.study import drawn_together, require_optuna, study_in

TRIALS = 14  # past those that TPE draws at random


class Stopped(Exception): ...


def search(folder: Path, at_once: int, stops: int = -1) -> dict[int, dict[str, Any]]:
    """Draw trials, and tell the study two scores of each; end at the so many-th thing that is written."""
    require_optuna()
    folder.mkdir(exist_ok=True)
    study = study_in(folder, ["up", "down"])
    searched = [
        Searched(("unlearn", "learning_rate"), Between(low=1e-5, high=1e-2, log=True)),
        Searched(("merge", "rule"), Among(choices=("ties", "average"))),
    ]
    steps = iter(range(10_000))

    def step() -> None:
        if next(steps) == stops:
            raise Stopped

    asked = study.ask

    def ask(*given: Any) -> Any:
        trial = asked(*given)
        step()
        return trial

    study.ask = ask  # type: ignore[method-assign]
    while (count := sum(trial.state.is_finished() for trial in study.trials)) < TRIALS:
        for number, params in drawn_together(searched, study, 3, count, min(at_once, TRIALS - count)):
            rate = params["unlearn.learning_rate"]
            study.tell(number, [rate * (1 + params["merge.rule"]), abs(rate - 1e-3)])
            step()
    return {trial.number: trial.params for trial in study.trials}


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_search_that_is_stopped_anywhere_draws_the_trials_that_it_would_have_drawn(
    tmp_path: Path, at_once: int
) -> None:
    undisturbed = search(tmp_path / "whole", at_once)
    assert len({repr(each) for each in undisturbed.values()}) == TRIALS
    for stops in (0, 1, 2, 3, 4, 5, 6, 19, 20, 21, 22, 23):
        folder = tmp_path / str(stops)
        with pytest.raises(Stopped):
            search(folder, at_once, stops)
        assert search(folder, at_once) == undisturbed, stops


def test_trials_that_are_drawn_at_once_are_not_one_trial(tmp_path: Path) -> None:
    together = search(tmp_path, TRIALS)
    assert len({params["unlearn.learning_rate"] for params in together.values()}) == TRIALS
