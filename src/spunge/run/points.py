"""What is known of a search so far, written into its folder; the points that no other trial beats, and their runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spunge.errors import RecipeError
from spunge.files import read_json, unsealed, write_text
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.report.search import Goal, Score, Search, Trial, write_search
from spunge.results import FILE
from spunge.run.executors.executor import Team
from spunge.run.folder import FAILED, claimed
from spunge.run.pipeline import begin, finish
from spunge.run.searching import vouch
from spunge.run.study import state_of
from spunge.run.trials import point_recipe
from spunge.run.tuning import POINTS, Tuning, scores_of

if TYPE_CHECKING:
    import optuna

ALL = "all"


def over(tuning: Tuning, study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials with scores, and those that failed and say why."""
    complete, failed = state_of("COMPLETE"), state_of("FAIL")
    trials = study.get_trials(deepcopy=False, states=(complete, failed))
    return [each for each in trials if each.state == complete or (tuning.trial(each.number) / FAILED).exists()]


def told(tuning: Tuning, study: "optuna.Study") -> Search:
    """What is known so far, written into the folder."""
    drawn_trials = over(tuning, study)
    best = {trial.number for trial in study.best_trials}
    alike: set[str] = set()
    trials = []
    for drawn in drawn_trials:
        own = repr(sorted(drawn.params.items()))
        trials.append(_trial(tuning, drawn, drawn.number in best and own not in alike))
        alike.add(own)
    search = Search(
        objectives=tuple(
            Goal(name=each.name, **way._asdict(), **vars(each))
            for each, way in zip(tuning.objectives, tuning.good, strict=True)
        ),
        ranges={setting.name: vars(setting.range) for setting in tuning.space.searched},
        base=tuning.base,
        trials=tuple(trials),
        base_test=_base_on_test(tuning, trials),
    )
    for trial in search.points:
        write_point(tuning, trial.number, trial.values)
    for file in (tuning.folder / POINTS).glob("*.yaml"):
        if file.stem not in {str(point.number) for point in search.points}:
            file.unlink()
    write_search(search, tuning.folder)
    vouch(tuning.folder)
    return search


def write_point(tuning: Tuning, number: int, values: Mapping[str, Any]) -> None:
    """The recipe of a trial, for a point; one that says something else is not it."""
    file, content = tuning.point(number).with_suffix(".yaml"), dump_recipe(point_recipe(tuning.space.recipe(values)))
    if not file.is_file() or file.read_bytes() != content.encode():
        write_text(file, content)


def _trial(tuning: Tuning, drawn: "optuna.trial.FrozenTrial", pareto: bool) -> Trial:
    """A trial that is over, as the study and its folder tell."""
    number = drawn.number
    if number not in tuning.told:
        folder = tuning.trial(number)
        failed = drawn.state == state_of("FAIL")
        told = unsealed(read_json(folder / FAILED)) or {}
        why = told.get("why", f"nobody can tell any more: {FAILED} is damaged") if failed else None
        scores = None if failed else scores_of(tuning, folder)
        tuning.told[number] = Trial(number=number, values=tuning.values(drawn.params), scores=scores, why=why)
    point = tuning.point(number)
    test = scores_of(tuning, point) if (point / FILE).exists() else None
    return replace(tuning.told[number], pareto=pareto, test=test)


def _base_on_test(tuning: Tuning, trials: Sequence[Trial]) -> tuple[Score, ...] | None:
    """The base is the same in every point's run."""
    judged = [trial for trial in trials if trial.test]
    return scores_of(tuning, tuning.point(judged[0].number), "base") if judged else None


def chosen(judge: Sequence[str], search: Search) -> list[int]:
    """The points that are to be judged. Raises RecipeError for what is none."""
    points = [point.number for point in search.points]
    for each in judge:
        if each != ALL and int(each) not in points:
            raise RecipeError(f"--judge: {each}: no such point; they are {', '.join(map(str, points))}")
    return points if ALL in judge else list(dict.fromkeys(map(int, judge)))


def judge_point(tuning: Tuning, team: Team, number: int, execution: ExecutionSettings) -> None:
    """Run a point's recipe, which is judged on test items. What is there already is not done again. execution: where."""
    folder = tuning.point(number)
    tuning.watcher.begin(f"point {number}")
    tuning.watcher.end("on test items")
    with claimed(folder):
        recipe = load_recipe(folder.with_suffix(".yaml")).model_copy(update={"execution": execution})
        begun = begin(recipe, folder, tuning.watcher)
        finish(begun, team, tuning.watcher, others=tuning.others(folder))
