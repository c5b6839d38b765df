"""Search the ranges of a recipe for settings that are good by two objectives (Optuna's TPE, arXiv 1907.10902).

    OUT/trials.journal     what was tried, as Optuna keeps it: a search that was stopped goes on from there
    OUT/base/              a run that judges the base on validation items
    OUT/trials/N/          a run of each trial, judged on validation items
    OUT/points/K.yaml      the recipe of each trial that no other one beats by both objectives; OUT/points/K/: its run on test items
    OUT/tune.json          every trial; OUT/tune.html shows them

Trials take each other's finished stages by key: one that changes the merge alone trains nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spunge.errors import RecipeError
from spunge.files import disk_errors_told, fingerprint, read_json, sealed, unsealed, write_json, write_text
from spunge.progress import SILENT, Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.loading import dump_recipe, load_recipe, read_draft
from spunge.recipe.ranges import SEARCHED, Among, Searched
from spunge.recipe.schema import Recipe
from spunge.report.search import Goal, Score, Search, Trial, write_search
from spunge.results import FILE, Results, Row, json_value, read_results
from spunge.run.executors.executor import Team
from spunge.run.folder import FAILED, TRIALS, claimed, default_folder
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.judge import evaluation_inputs
from spunge.run.objectives import Objective, Way, directions, objectives_of, refuse_unmeasured
from spunge.run.pipeline import begin, finish, team_of
from spunge.run.searching import is_whole, mend_journal, refuse_other, vouch
from spunge.run.stamps import read_stamp
from spunge.run.study import asked, require_optuna, state_of, study_in, taken_up
from spunge.run.trials import Space, base_recipe, point_recipe, space_of, trial_recipe

if TYPE_CHECKING:
    import optuna

POINTS = "points"
ALL = "all"


@dataclass
class Tuning:
    """A search at work. `good`: of each objective, the way that is."""

    folder: Path
    space: Space
    objectives: tuple[Objective, ...]
    seed: int
    watcher: Watcher
    good: tuple[Way, ...] = ()
    base: tuple[Score, ...] = ()
    told: dict[int, Trial] = field(default_factory=dict)  # number -> a trial that is over

    @property
    def runs(self) -> list[Path]:
        """The folders of runs that stages are taken from, the latest first."""
        trials = sorted((each for each in self.folder.glob(f"{TRIALS}/*") if each.name.isdigit()), key=_number)
        points = sorted((each for each in self.folder.glob(f"{POINTS}/*") if each.name.isdigit()), key=_number)
        return [*reversed(trials), *reversed(points), self.folder / "base"]

    def trial(self, number: int) -> Path:
        return self.folder / TRIALS / str(number)

    def point(self, number: int) -> Path:
        return self.folder / POINTS / str(number)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Setting -> value, of what Optuna drew."""
        return {setting.name: _value(setting, drawn[setting.name]) for setting in self.space.searched}


def _value(setting: Searched, drawn: Any) -> Any:
    return setting.range.choices[drawn] if isinstance(setting.range, Among) else drawn


def _number(folder: Path) -> int:
    return int(folder.name)


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
        tuning.base = tuple(_score(objective.row(measured, "base")) for objective in tuning.objectives)
        mend_journal(tuning.folder, tuning.watcher)
        study = study_in(tuning.folder, [way.wanted for way in tuning.good])
        _make_whole(tuning, study, team, first.execution)
        while (count := len(_over(tuning, study))) < trials:
            _next(tuning, study, team, count)
            _told(tuning, study)
        search = _told(tuning, study)
        if not search.points:
            why = f"; the first: {search.trials[0].why}" if search.trials else "; give --trials"
            raise RecipeError(f"tune: no trial gave scores{why}")
        for number in _chosen(judge, search):
            _judge(tuning, team, number, first.execution)
            search = _told(tuning, study)
    return search


def _refuse_other(tuning: Tuning, inputs: SeedInputs) -> None:
    """Raises RecipeError where the folder holds a search of other things: trials of both would not be comparable."""
    base, samples = inputs.base, [part.samples for part in inputs.parts.parts]
    samples += [each for each in (inputs.retain, base.lesson.samples if base.lesson else None) if each is not None]
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
    over = _over(tuning, study)
    for count, trial in enumerate(over):
        if trial.state == state_of("COMPLETE") and not is_whole(tuning.trial(trial.number)):
            made = _made(tuning, trial.number, tuning.values(trial.params), team, count)
            if isinstance(made, str):
                raise RecipeError(f"{str(tuning.trial(trial.number))!r} is damaged, and cannot be made again: {made}")
    for trial in over:
        point = tuning.point(trial.number)
        if (read_stamp(point, "results") or (point / FILE).exists()) and not is_whole(point):
            _write_point(tuning, trial.number, tuning.values(trial.params))
            _judge(tuning, team, trial.number, execution)


def _over(tuning: Tuning, study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials with scores, and those that failed and say why."""
    complete, failed = state_of("COMPLETE"), state_of("FAIL")
    trials = study.get_trials(deepcopy=False, states=(complete, failed))
    return [each for each in trials if each.state == complete or (tuning.trial(each.number) / FAILED).exists()]


def _next(tuning: Tuning, study: "optuna.Study", team: Team, count: int) -> None:
    """Make the trial that was stopped, or else the next one. count: of those that are over."""
    number, drawn = taken_up(tuning.space.searched, study) or asked(tuning.space.searched, study, tuning.seed, count)
    values = tuning.values(drawn)
    tuning.watcher.begin(f"trial {number}")
    tuning.watcher.end(", ".join(f"{name} {value}" for name, value in values.items()))
    made = _made(tuning, number, values, team, count)
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


def _made(tuning: Tuning, number: int, values: Mapping[str, Any], team: Team, count: int) -> Results | str:
    """A trial's results; or why its settings are of no use. What would be wrong with every trial is raised."""
    folder = tuning.trial(number)
    with claimed(folder):
        try:
            recipe = trial_recipe(tuning.space.recipe(values), tuning.objectives)
            begun = begin(recipe, folder, tuning.watcher, written=False)
        except RecipeError as error:
            if count == 0:
                raise
            return _of_settings(error)
        try:
            return finish(begun, team, tuning.watcher, others=_others(tuning, folder))
        except RecipeError as error:
            return _of_settings(error)


def _of_settings(error: RecipeError) -> str:
    """What an error says of a trial's settings. Raises it where it is about something else, such as a full disk."""
    if not re.match(rf"(?:{'|'.join(SEARCHED)})[.:]", str(error)):
        raise error
    return str(error)


def _unusable(rows: Sequence[Row | None], objectives: Sequence[Objective]) -> str:
    """Why scores are none to go by; empty where they are."""
    for row, objective in zip(rows, objectives, strict=True):
        if row is None or not math.isfinite(row.value):
            return f"{objective.name} is {'not measured' if row is None else row.value}"
    return ""


def _score(row: Row | None) -> Score:
    return Score(value=math.nan) if row is None else Score(value=row.value, low=row.low, high=row.high, n=row.n)


def _told(tuning: Tuning, study: "optuna.Study") -> Search:
    """What is known so far, written into the folder."""
    over = _over(tuning, study)
    best = {trial.number for trial in study.best_trials}
    alike: set[str] = set()
    trials = []
    for drawn in over:
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
        _write_point(tuning, trial.number, trial.values)
    for file in (tuning.folder / POINTS).glob("*.yaml"):
        if file.stem not in {str(point.number) for point in search.points}:
            file.unlink()
    write_search(search, tuning.folder)
    vouch(tuning.folder)
    return search


def _write_point(tuning: Tuning, number: int, values: Mapping[str, Any]) -> None:
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
        scores = None if failed else _scores(tuning, folder)
        tuning.told[number] = Trial(number=number, values=tuning.values(drawn.params), scores=scores, why=why)
    point = tuning.point(number)
    test = _scores(tuning, point) if (point / FILE).exists() else None
    return replace(tuning.told[number], pareto=pareto, test=test)


def _scores(tuning: Tuning, run: Path, stage: str = "merged") -> tuple[Score, ...]:
    results = read_results(run)
    return tuple(_score(objective.row(results, stage)) for objective in tuning.objectives)


def _base_on_test(tuning: Tuning, trials: Sequence[Trial]) -> tuple[Score, ...] | None:
    """The base is the same in every point's run."""
    judged = [trial for trial in trials if trial.test]
    return _scores(tuning, tuning.point(judged[0].number), "base") if judged else None


def _chosen(judge: Sequence[str], search: Search) -> list[int]:
    """The points that are to be judged. Raises RecipeError for what is none."""
    points = [point.number for point in search.points]
    for each in judge:
        if each != ALL and int(each) not in points:
            raise RecipeError(f"--judge: {each}: no such point; they are {', '.join(map(str, points))}")
    return points if ALL in judge else list(dict.fromkeys(map(int, judge)))


def _others(tuning: Tuning, folder: Path) -> list[Path]:
    return [other for other in tuning.runs if other != folder]


def _judge(tuning: Tuning, team: Team, number: int, execution: ExecutionSettings) -> None:
    """Run a point's recipe, which is judged on test items. What is there already is not done again. execution: where."""
    folder = tuning.point(number)
    tuning.watcher.begin(f"point {number}")
    tuning.watcher.end("on test items")
    with claimed(folder):
        recipe = load_recipe(folder.with_suffix(".yaml")).model_copy(update={"execution": execution})
        begun = begin(recipe, folder, tuning.watcher)
        finish(begun, team, tuning.watcher, others=_others(tuning, folder))
