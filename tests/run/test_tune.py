"""A search tries settings on validation items, shares what is trained, goes on where it was stopped; the test is of others."""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import spunge
from searching import searched
from spunge.errors import RecipeError
from spunge.files import alone, sealed, write_json
from spunge.progress import SILENT
from spunge.registry import EVALUATORS
from spunge.report.making import making
from spunge.report.search import Goal, Score, Search, Trial, search_text
from spunge.results import Results
from spunge.run.objectives import Way
from spunge.run.sharing import take
from spunge.run.stages.building import build
from spunge.run.stamps import read_stamp
from spunge.run.texts import clean_texts
from spunge.run.tune import tune
from spunge.run.verify import verify
from started import TWO, forked
from toys import Told, rows

PARTS = ["asia", "europe"]
OBJECTIVES = ["forgotten/perplexity/europe,kept/perplexity/retain"]


def searching(tiny: Callable[..., Path], files: dict[str, Path]) -> dict[str, Any]:
    return {
        "model": {"path": str(tiny("llama")), "dtype": "float32"},
        "forget": {"source": str(files["forget"])},
        "split": {"by": "topic"},
        "retain": {"source": str(files["retain"])},
        "unlearn": {
            "method": "rmu",
            "layer": 2,
            "steps": 2,
            "batch_size": 4,
            "learning_rate": {"choices": [0.01, 0.03]},
        },
        "merge": {
            "rule": "ties",
            "density": {"low": 0.2, "high": 0.9},
            "scale": {"low": 0.5, "high": 2.0, "log": True},
        },
        "evaluate": [
            {"kind": "perplexity", "name": "forgotten"},
            {"kind": "perplexity", "name": "kept", "source": str(files["retain"]), "subject": "retain", "by": "NULL"},
            {"kind": "perplexity", "name": "beside", "source": str(files["retain"]), "subject": "beside", "by": "NULL"},
        ],
        "controls": [],
    }


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rows")
    files = {}
    for name, topics in {"forget": ["europe", "asia"], "retain": ["other"]}.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows(topics)))
    return searching(tiny, files)


class Done:
    """A search of four trials, and what was said."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder, self.told = folder, Told()
        self.search = tune(recipe, 4, OBJECTIVES, folder, watcher=self.told)


@pytest.fixture(scope="module")
def done(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("search") / "out", recipe)


def test_a_trial_that_changes_the_merge_alone_trains_nothing(done: Done) -> None:
    rates = {trial.values["unlearn.learning_rate"] for trial in done.search.trials}
    assert rates == {0.01, 0.03}
    trained = [line for line in done.told.lines if line.startswith("unlearn ")]
    made = [place for place, line in enumerate(done.told.lines) if line.startswith("unlearn ")]
    taken = [place for place in made if done.told.lines[place + 1].startswith("from trials/")]
    assert len(trained) - len(taken) == len(rates) * 2  # two branches each
    assert len(taken) == (4 - len(rates)) * 2


def test_a_trial_gives_what_a_run_of_its_settings_gives(done: Done, recipe: dict[str, Any], tmp_path: Path) -> None:
    trial = done.search.trials[3]
    content = {**recipe, "unlearn": {**recipe["unlearn"]}, "merge": {**recipe["merge"]}}
    for setting, value in trial.values.items():
        block, name = setting.split(".")
        content[block][name] = value
    content["evaluate"] = [{**entry, "half": "validation"} for entry in recipe["evaluate"]]
    results = spunge.run(content, tmp_path / "run")
    assert trial.scores is not None
    assert trial.scores[0].value == results.value("merged", "europe", "perplexity")
    assert trial.scores[1].value == results.value("merged", "retain", "perplexity")


def test_no_point_is_beaten_by_another_trial(done: Done) -> None:
    assert [goal.wanted for goal in done.search.objectives] == ["up", "down"]
    values = {
        trial.number: (-trial.scores[0].value, trial.scores[1].value) for trial in done.search.trials if trial.scores
    }
    best = {
        number
        for number, own in values.items()
        if not any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in values.values())
    }
    assert {trial.number for trial in done.search.points} == best
    assert {file.stem for file in (done.folder / "points").glob("*.yaml")} == set(map(str, best))


def test_a_search_that_is_stopped_goes_on_as_if_it_was_not(
    done: Done, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(search: Search) -> list[Any]:
        return [(trial.values, trial.scores) for trial in search.trials]

    for stop in (2, 5):  # after a branch, and after the scores
        assert searched(recipe, 2, OBJECTIVES, tmp_path / "out", after=stop)[0] is None
    with (tmp_path / "out" / "trials.journal").open("a") as journal:
        journal.write('{"op_code": 4, "worker_id"')  # a line that was cut off
    (tmp_path / "out" / "trials.journal.lock").touch()
    told = Told()
    search = tune(recipe, 2, OBJECTIVES, tmp_path / "out", watcher=told)
    assert values(search) == values(done.search)[:2]


@pytest.mark.thorough
def test_trials_at_once_train_nothing_twice_and_go_on_where_they_were_stopped(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    whole, lines = forked(searched, recipe, 5, OBJECTIVES, tmp_path / "whole", TWO, spares=2)
    assert whole
    stamps = [
        read_stamp(tmp_path / "whole" / "trials" / str(number), f"branch:{part}")
        for number in range(5)
        for part in PARTS
    ]
    keys = {stamp.key for stamp in stamps if stamp is not None}
    taken = [line for line, outcome in pairwise(lines) if "unlearn " in line and outcome.startswith("from trials/")]
    assert len(taken) == len(stamps) - len(keys) > 0
    stopped = forked(searched, recipe, 5, OBJECTIVES, tmp_path / "out", TWO, 4, spares=2)
    assert stopped[0] is None
    assert forked(searched, recipe, 5, OBJECTIVES, tmp_path / "out", TWO, spares=2)[0] == whole


@pytest.mark.thorough
def test_points_are_judged_once_and_on_the_other_items(done: Done, recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "out"))
    number = done.search.points[0].number
    search = tune(recipe, 4, OBJECTIVES, folder, judge=[str(number)])
    point = search.points[0]
    assert point.test is not None
    told = Told()
    assert tune(recipe, 0, OBJECTIVES, folder, judge=[str(number)], watcher=told) == search
    assert not told.judged
    results = {half: spunge.read_results(run) for half, run in _runs(folder, number).items()}
    assert [score.value for score in search.base_test or ()] == [
        results["test"].value("base", "europe", "perplexity"),
        results["test"].value("base", "retain", "perplexity"),
    ]
    of = {half: {each.name: each for each in result.evaluations} for half, result in results.items()}
    assert set(of["test"]) == {"forgotten", "kept", "beside"}
    assert set(of["validation"]) == {"forgotten", "kept"}
    for name in of["validation"]:
        assert of["test"][name].rows != of["validation"][name].rows
    assert (folder / "points" / str(number) / "merged" / "config.json").exists()
    assert not (folder / "trials" / str(number) / "merged").exists()


def _runs(folder: Path, number: int) -> dict[str, Path]:
    return {"validation": folder / "trials" / str(number), "test": folder / "points" / str(number)}


def test_the_page_opens_offline_and_shows_every_trial(done: Done) -> None:
    page = (done.folder / "tune.html").read_text()
    content = json.loads((done.folder / "tune.json").read_text())
    assert "default-src 'none'" in page
    assert [trial["number"] for trial in content["trials"]] == list(range(4))
    assert page.count('class="mark merged"') == len(done.search.points) + 1  # and one in the legend
    assert page.count('class="mark branch"') == 4 - len(done.search.points) + 1


@pytest.mark.thorough
def test_a_trial_whose_settings_are_of_no_use_is_told_and_the_search_goes_on(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    content = {**recipe, "unlearn": {**recipe["unlearn"], "learning_rate": {"choices": [1e-30, 0.01]}}}
    search = tune(content, 2, OBJECTIVES, tmp_path / "out")
    failed = [trial for trial in search.trials if trial.why]
    assert {trial.values["unlearn.learning_rate"] for trial in failed} == {1e-30}
    assert all("nothing was changed" in (trial.why or "") for trial in failed)
    assert len(search.trials) == 2
    assert search.points


@pytest.mark.thorough
def test_an_aggregate_is_an_objective_also_of_calibrated_models(recipe: dict[str, Any], tmp_path: Path) -> None:
    calibrated = {"evaluation": "kept", "metric": "perplexity", "keep": 0.99, "tries": 2}
    plain = recipe["evaluate"][1]["source"]
    exact = {"kind": "memorization", "metrics": ["exact"]}
    evaluate = [
        *recipe["evaluate"],
        {**exact, "name": "rows"},
        {**exact, "name": "plain", "source": plain, "by": "NULL"},
    ]
    terms = [
        {"evaluation": "plain", "metric": "exact memorization"},
        {"evaluation": "rows", "metric": "exact memorization", "subject": "asia"},
    ]
    recipe = {**recipe, "evaluate": evaluate, "aggregates": {"exactness": {"kind": "harmonic_mean", "of": terms}}}
    content = {**recipe, "calibrate": calibrated, "merge": {"rule": "ties", "density": {"low": 0.2, "high": 0.9}}}
    search = tune(content, 1, ["exactness, forgotten/perplexity/asia"], tmp_path / "out")
    assert [goal.wanted for goal in search.objectives] == ["up", "up"]
    results = spunge.read_results(tmp_path / "out" / "trials" / "0")
    assert [score.value for score in search.trials[0].scores or ()] == [
        results.value("merged", "all", "exactness"),
        results.value("merged", "asia", "perplexity"),
    ]


def test_what_should_be_near_a_target_is_searched_by_its_distance_and_its_points_go_by_that() -> None:
    goal = Goal(name="AUROC", evaluation="seen", metric="AUROC", subject="all", wanted="near", target=0.5)
    other = Goal(name="kept", evaluation="kept", metric="accuracy", subject="all", wanted="up")
    assert [Way("near", 0.5).sought(value) for value in (0.25, 0.75, 0.5)] == [0.25, 0.25, 0.0]
    assert (Way("up").sought(0.3), Way("down").sought(0.3)) == (0.3, 0.3)
    trials = tuple(
        Trial(number=number, values={}, scores=(Score(value=area), Score(value=kept)), pareto=True)
        for number, (area, kept) in enumerate([(0.9, 0.9), (0.375, 0.5), (0.5625, 0.4)])
    )
    search = Search(objectives=(goal, other), ranges={}, base=(Score(value=0.95), Score(value=1.0)), trials=trials)
    assert [point.number for point in search.points] == [2, 1, 0]
    assert "A: AUROC (nearer to 0.5 is better)" in search_text(search)


def changed(recipe: dict[str, Any], setting: str, value: Any) -> dict[str, Any]:
    block, name = setting.split(".")
    return {**recipe, block: {**recipe[block], name: value}}


@pytest.mark.parametrize(
    ("setting", "value", "objectives", "said"),
    [
        (
            "merge.density",
            {"low": 0.5, "high": 2},
            OBJECTIVES,
            "merge.density: 2: it should be less than or equal to 1",
        ),
        ("merge.rule", {"choices": ["ties", "tise"]}, OBJECTIVES, "merge.rule: no rule 'tise'"),
        ("unlearn.steps", {"low": 0.5, "high": 2.5}, OBJECTIVES, "unlearn.steps: 0.5: it should be a valid integer"),
        ("merge.density", 0.5, ["kept/perplexity/retain"], "--objectives: .*: give two that differ"),
        (
            "merge.density",
            0.5,
            ["kpt/perplexity/retain", "x"],
            "no evaluation or aggregate is called 'kpt'; did you mean 'kept'",
        ),
        ("merge.density", 0.5, ["kept/perplexity,forgotten/perplexity/asia"], "'kept/perplexity' is not of the form"),
        ("merge.density", 0.5, ["kept/accuracy/retain,forgotten/perplexity/asia"], "'kept' measures no 'accuracy'"),
        (
            "merge.density",
            0.5,
            ["kept/perplexity/retin,forgotten/perplexity/asia"],
            "'kept' has no 'retin'; did you mean 'retain'",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    recipe: dict[str, Any], tmp_path: Path, setting: str, value: Any, objectives: list[str], said: str
) -> None:
    told = Told()
    with pytest.raises(RecipeError, match=said):
        tune(changed(recipe, setting, value), 2, objectives, tmp_path / "out", watcher=told)
    assert not [line for line in told.lines if line.startswith("unlearn")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"judge": ["best"]}, "--judge: 'best': give a point's number, or all"),
        ({"judge": ["99"]}, "--judge: 99: no such point; they are "),
        ({"trials": -1}, "--trials: -1: give how many trials there should be in all"),
    ],
)
def test_a_point_or_a_count_that_is_none_is_refused(
    done: Done, recipe: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        tune(recipe, objectives=OBJECTIVES, out=done.folder, **{"trials": 4, **options})


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x41]) + data[len(data) // 2 + 1 :],
    "null": lambda data: b"null",
    "list": lambda data: b"[]\n",
    "object": lambda data: b"{}\n",
    "deleted": None,
}
HELD = (
    "trials.journal",
    "trials/1/results.json",
    "trials/1/stamps/results.json",
    "points/K.yaml",
    "tune.json",
    "search.json",
)
FEW = {("trials.journal", "flipped"), ("search.json", "flipped")}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if (name, damage) in FEW else pytest.mark.thorough)
        for name in HELD
        for damage in DAMAGES
    ],
)
def test_a_damaged_file_of_a_search_changes_nothing_or_is_named(
    done: Done, recipe: dict[str, Any], tmp_path: Path, name: str, damage: str
) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "out"))
    point = done.search.points[0].number
    file, change, told = folder / name.replace("K", str(point)), DAMAGES[damage], Told()
    data = file.read_bytes()
    file.unlink() if change is None else file.write_bytes(change(data))
    if name == "search.json" and change is not None:
        with pytest.raises(RecipeError, match=r"search\.json' is damaged"):
            tune(recipe, 4, OBJECTIVES, folder, watcher=told)
        assert file.read_bytes() == change(data)
        return
    assert tune(recipe, 4, OBJECTIVES, folder, watcher=told) == done.search
    assert not [line for line in told.lines if line.startswith(("unlearn ", "judge "))]  # no work is lost
    assert file.read_bytes() == data or name in ("trials.journal", "search.json") or "results" in name
    assert verify(folder).problems == []
    told = Told()
    assert tune(recipe, 4, OBJECTIVES, folder, watcher=told) == done.search
    assert not [line for line in told.lines if line.startswith("trials.journal")]


@pytest.mark.thorough
def test_a_failure_of_another_trial_that_had_the_number_is_no_trials(
    done: Done, recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "out"))
    failure = folder / "trials" / "1" / "failed.json"
    write_json(failure, sealed({"why": "merge.density: of another trial"}))
    (folder / "trials.journal").unlink()  # which is drawn anew
    assert tune(recipe, 4, OBJECTIVES, folder) == done.search
    assert not failure.exists()


def test_results_of_a_point_that_are_damaged_are_made_again(done: Done, recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "out"))
    point = str(done.search.points[0].number)
    search = tune(recipe, 4, OBJECTIVES, folder, judge=[point])
    results = folder / "points" / point / "results.json"
    content = results.read_text()
    results.write_text(content.replace('"value": 1', '"value": 2'))
    (folder / "points" / f"{point}.yaml").write_text("steps: 1")
    assert tune(recipe, 4, OBJECTIVES, folder) == search
    assert json.loads(results.read_text())["rows"] == json.loads(content)["rows"]


def test_a_search_is_verified_and_cleaned_as_its_runs_are(done: Done, recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "out"))
    runs = [folder / "base", *(folder / "trials").iterdir()]
    (folder / "trials" / "9" / "stamps").mkdir(parents=True)
    (folder / "trials" / "9" / "failed.json").write_text('{"why": "its settings"}')
    checked, each = verify(folder), [verify(run) for run in runs]
    assert (checked.problems, checked.files) == ([], sum(run.files for run in each))
    (folder / "trials" / "1" / "results.json").write_text("{}")
    for kept in (folder / "base", folder / "trials" / "2"):
        (kept / "evaluation" / "base" / "texts-0123456789abcdef.jsonl").write_text('{"row": 0, "texts": ["a"]}\n')
    assert [problem.split(" ")[:2] for problem in verify(folder).problems] == [["trials/1:", "results.json"]]
    with alone(folder / "trials" / "0"), pytest.raises(RecipeError, match="another process is at work"):
        clean_texts(folder)
    assert clean_texts(folder).files == 2
    with pytest.raises(RecipeError, match="is no run's folder"):
        clean_texts(tmp_path)


def test_without_optuna_the_mend_is_said(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"tune: needs Optuna; pip install 'spunge\[tune\]'"):
        tune(recipe, 1, OBJECTIVES, tmp_path / "out")


def test_a_stage_whose_files_are_damaged_is_not_taken(done: Done, tmp_path: Path) -> None:
    trial = done.folder / "trials" / "0"
    other, graph = tmp_path / "other", build(spunge.load_recipe(trial / "recipe.yaml"), tmp_path / "mine", False).graph
    shutil.copytree(trial, other)
    delta = other / "branches" / "asia" / "delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1] + b"?")
    assert not take(graph, "branch:asia", [other], SILENT)
    assert not list((tmp_path / "mine").rglob("*.*"))
    assert take(graph, "branch:asia", [other, trial], SILENT)
    assert graph.state("branch:asia").done
    stamp = graph.state("branch:asia").stamp
    assert stamp is not None
    assert (stamp.seconds, stamp.taken) == (0.0, "trials/0"), "its time is the other run's"
    told = dict(making(tmp_path / "mine", Results(rows=(), seconds=0.0), None).facts)
    assert told == {
        "Time of all stages that were made here": "0.0 s",
        "Stages taken from other runs": "1 from trials/0",
    }


def test_what_is_taken_again_after_a_stop_leaves_the_run_that_it_is_taken_from_whole(
    done: Done, tmp_path: Path
) -> None:
    """Where its files are there already, under a second name of the other run's, and the stamp is not."""
    other = Path(shutil.copytree(done.folder / "trials" / "0", tmp_path / "other"))
    graph = build(spunge.load_recipe(other / "recipe.yaml"), tmp_path / "mine", False).graph
    for _ in range(2):
        assert take(graph, "branch:asia", [other], SILENT)
        (tmp_path / "mine" / "stamps" / "branch" / "asia.json").unlink()
        assert verify(other).problems == []


@pytest.mark.parametrize(
    ("change", "seed", "said"),
    [
        ({"merge": {"rule": "ties", "scale": {"low": 0.5, "high": 3.0}}}, 0, "ranges"),
        ({}, 1, "seed"),
    ],
)
def test_a_folder_of_another_search_is_not_gone_on_with(
    done: Done, recipe: dict[str, Any], change: dict[str, Any], seed: int, said: str
) -> None:
    content = {**recipe, **{block: {**recipe[block], **own} for block, own in change.items()}}
    with pytest.raises(RecipeError, match=f"holds a search of other {said}"):
        tune(content, 4, OBJECTIVES, done.folder, seed=seed)


@pytest.mark.thorough
def test_a_search_of_changed_rows_is_not_gone_on_with(recipe: dict[str, Any], tmp_path: Path) -> None:
    source = Path(shutil.copy(recipe["forget"]["source"], tmp_path / "forget.jsonl"))
    content = {
        **recipe,
        "forget": {"source": str(source)},
        "teach": {"source": str(source), "steps": 1, "batch_size": 2},
    }
    search = tune(content, 1, OBJECTIVES, tmp_path / "out")
    assert tune(content, 1, OBJECTIVES, tmp_path / "out") == search
    source.write_text(source.read_text() + json.dumps({"topic": "asia", "text": "tokyo is the capital"}) + "\n")
    with pytest.raises(RecipeError, match="holds a search of other rows"):
        tune(content, 1, OBJECTIVES, tmp_path / "out")


def test_a_search_whose_evaluations_measure_otherwise_now_is_not_gone_on_with(
    done: Done, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(EVALUATORS), "version", lambda registry, name: "of tomorrow")
    with pytest.raises(RecipeError, match="holds a search of other instruments"):
        tune(recipe, 4, OBJECTIVES, done.folder)


def test_a_run_and_a_search_do_not_share_a_folder(
    done: Done, toy_recipe: dict[str, Any], recipe: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="is no run's folder"):
        spunge.run(toy_recipe, done.folder)
    with pytest.raises(RecipeError, match="is no search's folder"):
        tune(recipe, 1, OBJECTIVES, done.folder / "base")


def test_a_run_refuses_ranges_in_a_line(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^unlearn\.learning_rate: a range, which `spunge tune` searches"):
        spunge.run(recipe, tmp_path / "run")
