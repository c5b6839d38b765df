"""Search the ranges of a recipe for settings that are good by two objectives (Optuna's TPE, arXiv 1907.10902).

    OUT/trials.journal     what was tried, as Optuna keeps it: a search that was stopped goes on from there
    OUT/base/              a run that judges the base on validation items
    OUT/trials/N/          a run of each trial, judged on validation items
    OUT/points/K.yaml      the recipe of each trial that no other one beats by both objectives; OUT/points/K/: its run on test items
    OUT/tune.json          every trial; OUT/tune.html shows them

Trials take each other's finished stages by key: one that changes the merge alone trains nothing. As many are made at once as the
recipe's `execution` makes stages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spunge.errors import RecipeError
from spunge.files import disk_errors_told, fingerprint
from spunge.progress import SILENT, Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.loading import read_draft
from spunge.recipe.schema import Recipe
from spunge.registry import EXECUTORS
from spunge.report.search import Search
from spunge.results import FILE, json_value
from spunge.run.executors.executor import Team
from spunge.run.folder import TRIALS, claimed, default_folder
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.judge import evaluation_inputs
from spunge.run.objectives import directions, objectives_of, refuse_unmeasured
from spunge.run.pipeline import begin, finish, team_of
from spunge.run.points import ALL, chosen, judge_point, over, told, write_point
from spunge.run.searching import is_whole, mend_journal, refuse_other
from spunge.run.stamps import read_stamp
from spunge.run.study import drawn_together, require_optuna, state_of, study_in
from spunge.run.trials import base_recipe, point_recipe, space_of, trial_recipe
from spunge.run.trying import made_together, try_together
from spunge.run.tuning import Tuning, score

if TYPE_CHECKING:
    import optuna


def tune(
    recipe: Mapping[str, Any] | str | Path,
    trials: int,
    objectives: Sequence[str],
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    judge: Sequence[str] = (),
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Search:
    """Try settings until there are so many trials, those of an earlier call among them; then judge chosen points on test items.

    recipe: with ranges under unlearn and merge. objectives: two of EVALUATION/METRIC/SUBJECT. judge: numbers of points, or `all`.
    seed: of the search. Raises RecipeError for a recipe, a range or an objective that is wrong, before anything is trained.
    """
    require_optuna()
    if trials < 0 or not (trials or judge):
        raise RecipeError(f"--trials: {trials}: give how many trials there should be in all")
    space = space_of(read_draft(recipe, overrides))
    first = space.recipe({setting.name: setting.range.ends[0] for setting in space.searched})
    goals = objectives_of(objectives, first)
    if first.watch is not None and first.watch.chooses:
        raise RecipeError(
            "watch.keep: best: a step chosen in each trial and a trial chosen by its scores are two choices; set keep to last, and "
            "give unlearn.steps a range"
        )
    if first.track is not None:
        raise RecipeError("track: the trials of a search are not tracked; leave it out, and look at the search's page")
    refuse_unknown(judge)
    folder = Path(out or f"{default_folder(recipe)}-tune").resolve()
    refuse_unmeasured(goals, BaseInputs(trial_recipe(first, goals), folder).evaluations)
    _ = BaseInputs(point_recipe(first), folder).evaluations  # what cannot be halved is said now
    with disk_errors_told(folder), claimed(folder, TRIALS):
        return _tuned(Tuning(folder, space, goals, seed, watcher or SILENT), first, trials, judge)


def refuse_unknown(judge: Sequence[str]) -> None:
    for each in judge:
        if each != ALL and not each.isdecimal():
            raise RecipeError(f"--judge: {each!r}: give a point's number, or {ALL}")


def _tuned(tuning: Tuning, first: Recipe, trials: int, judge: Sequence[str]) -> Search:
    began = begin(base_recipe(first, tuning.objectives), tuning.folder / "base", tuning.watcher)
    _refuse_other(tuning, began.seeds[0].inputs)
    with team_of(began, tuning.watcher) as team:
        measured = finish(began, team, tuning.watcher)
        tuning.good = directions(tuning.objectives, measured)
        tuning.base = tuple(score(objective.row(measured, "base")) for objective in tuning.objectives)
        mend_journal(tuning.folder, tuning.watcher)
        study = study_in(tuning.folder, [way.wanted for way in tuning.good])
        _make_whole(tuning, study, team, first.execution)
        at_once = EXECUTORS.get(first.execution.kind).room(first)
        while (count := len(over(tuning, study))) < trials:
            drawn = drawn_together(tuning.space.searched, study, tuning.seed, count, min(at_once, trials - count))
            try_together(tuning, study, team, drawn, count)
            told(tuning, study)
        search = told(tuning, study)
        if not search.points:
            why = f"; the first: {search.trials[0].why}" if search.trials else "; give --trials"
            raise RecipeError(f"tune: no trial gave scores{why}")
        for number in chosen(judge, search):
            judge_point(tuning, team, number, first.execution)
            search = told(tuning, study)
    return search


def _refuse_other(tuning: Tuning, inputs: SeedInputs) -> None:
    """Raises RecipeError where the folder holds a search of other things: trials of both would not be comparable."""
    base, samples = inputs.base, [part.samples for part in inputs.parts.parts]
    samples += [
        each
        for each in (inputs.retain, inputs.decouple, base.lesson.samples if base.lesson else None)
        if each is not None
    ]
    about = {
        "ranges": {setting.name: json_value(vars(setting.range)) for setting in tuning.space.searched},
        "objectives": [objective.name for objective in tuning.objectives],
        "recipe": fingerprint(
            {name: value for name, value in tuning.space.draft.content.items() if name != "execution"}
        ),
        "rows": [*(items.sha256 for items in base.evaluations), *(each.sha256 for each in samples)],
        "instruments": fingerprint([evaluation_inputs(items, base) for items in base.evaluations]),
        "seed": tuning.seed,
        "model": base.unconverted if base.conversion else base.key_of(base.given),
    }
    refuse_other(tuning.folder, about)


def _make_whole(tuning: Tuning, study: "optuna.Study", team: Team, execution: ExecutionSettings) -> None:
    """Make what is missing of trials and points that are over, and whose results are not as they were written."""
    finished = over(tuning, study)
    for count, trial in enumerate(finished):
        if trial.state == state_of("COMPLETE") and not is_whole(tuning.trial(trial.number)):
            made = made_together(tuning, {trial.number: tuning.values(trial.params)}, team, count)[trial.number]
            if isinstance(made, str):
                raise RecipeError(f"{str(tuning.trial(trial.number))!r} is damaged, and cannot be made again: {made}")
    for trial in finished:
        point = tuning.point(trial.number)
        if (read_stamp(point, "results") or (point / FILE).exists()) and not is_whole(point):
            write_point(tuning, trial.number, tuning.values(trial.params))
            judge_point(tuning, team, trial.number, execution)
