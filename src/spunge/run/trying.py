"""Make the trials of a search that were drawn together, and tell the study what they gave."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from spunge.errors import RecipeError
from spunge.files import sealed, write_json
from spunge.recipe.ranges import SEARCHED
from spunge.results import Results, Row, read_results
from spunge.run.executors.executor import Team
from spunge.run.folder import FAILED, claimed
from spunge.run.objectives import Objective
from spunge.run.pipeline import begin, finish_all
from spunge.run.schedule import Schedule
from spunge.run.stages.building import Run
from spunge.run.study import Drawn, state_of
from spunge.run.trials import trial_recipe
from spunge.run.tuning import Tuning

if TYPE_CHECKING:
    import optuna


def try_together(tuning: Tuning, study: "optuna.Study", team: Team, trials: Sequence[Drawn], count: int) -> None:
    """Make some trials at once. count: of those that are over. The study is told when all are made, in their order: what is drawn
    next does not depend on which of them ended first."""
    values = {number: tuning.values(drawn) for number, drawn in trials}
    for number, own in values.items():
        tuning.watcher.begin(f"trial {number}")
        tuning.watcher.end(", ".join(f"{name} {value}" for name, value in own.items()))
    for number, made in made_together(tuning, values, team, count).items():
        _tell(tuning, study, number, made)


def _tell(tuning: Tuning, study: "optuna.Study", number: int, made: Results | str) -> None:
    rows = made if isinstance(made, str) else [objective.row(made) for objective in tuning.objectives]
    why = rows if isinstance(rows, str) else _unusable(rows, tuning.objectives)
    if why:
        tuning.watcher.begin(f"trial {number} failed")
        tuning.watcher.end(why)
        write_json(tuning.trial(number) / FAILED, sealed({"why": why}))
        study.tell(number, state=state_of("FAIL"))
    else:
        (tuning.trial(number) / FAILED).unlink(missing_ok=True)  # of another trial that had this number before
        measured = [row.value for row in rows if isinstance(row, Row)]
        study.tell(number, [way.sought(value) for way, value in zip(tuning.good, measured, strict=True)])


def made_together(
    tuning: Tuning, trials: Mapping[int, Mapping[str, Any]], team: Team, count: int
) -> dict[int, Results | str]:
    """Of each trial its results, or why its settings are of no use. What would be wrong with every trial is raised.

    trials: number -> setting -> value. count: trials that are over.
    """
    made: dict[int, Results | str] = {}
    begun: dict[int, Run] = {}
    with ExitStack() as claims:
        for number, values in trials.items():
            claims.enter_context(claimed(tuning.trial(number)))
            try:
                recipe = trial_recipe(tuning.space.recipe(values), tuning.objectives)
                begun[number] = begin(recipe, tuning.trial(number), tuning.watcher, written=False)
            except RecipeError as error:
                if count + len(begun) + len(made) == 0 or not _of_settings(error):
                    raise
                made[number] = str(error)
        schedules = {
            number: Schedule(run, tuning.watcher, others=tuning.others(run.graph.folder), own=_of_settings)
            for number, run in begun.items()
        }
        finish_all([*schedules.values()], team, tuning.watcher)
        for number, schedule in schedules.items():
            made[number] = str(schedule.refused) if schedule.refused else read_results(schedule.folder)
    return {number: made[number] for number in trials}


def _of_settings(error: RecipeError) -> bool:
    """Whether an error is of a trial's settings, and not of something else, such as a full disk."""
    return re.match(rf"(?:{'|'.join(SEARCHED)})[.:]", str(error)) is not None


def _unusable(rows: Sequence[Row | None], objectives: Sequence[Objective]) -> str:
    """Why scores are none to go by; empty where they are."""
    for row, objective in zip(rows, objectives, strict=True):
        if row is None or not math.isfinite(row.value):
            return f"{objective.name} is {'not measured' if row is None else row.value}"
    return ""
