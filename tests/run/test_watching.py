"""Trainings that are measured on their way: the same bytes, a curve, and the best step where it is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from spunge.errors import RecipeError
from spunge.progress import Silent
from spunge.recipe.loading import load_recipe
from spunge.recipe.watching import Watch
from spunge.run.stages.building import build, lineups
from spunge.run.stages.unfinished import unwatched
from spunge.run.status import status
from spunge.run.verify import verify
from spunge.run.watching import curves_of, ranked, steps_between, watching_inputs
from spunge.unlearning.watching import Reading
from toys import Told, rows

LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}
# The tiny model's perplexity on what is kept grows as it forgets, but for a while.
BESIDE = {"evaluation": "kept", "metric": "perplexity", "share": 0.9}


@pytest.fixture
def watched(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Gradient ascent in five steps, measured at 0, 2, 4 and 5 on what it forgets and on what is to be kept."""
    ascent = {"method": "ga", "steps": 5, "learning_rate": 0.02, "batch_size": 6, "trainable": LORA}
    evaluate = [{"kind": "perplexity", "name": "forgotten"}, toy_recipe["evaluate"][1] | {"name": "kept"}]
    watch = {"every": 2, "evaluation": "forgotten", "metric": "perplexity", "beside": BESIDE}
    return toy_recipe | {"unlearn": ascent, "controls": [], "evaluate": evaluate, "watch": watch}


def delta(folder: Path) -> bytes:
    return (folder / "delta.safetensors").read_bytes()


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "delta.json").read_text())["watched"]
    return content


def points(curve: Any) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in curve.points]


def test_watching_changes_no_byte_and_its_last_point_is_what_is_judged(watched: dict[str, Any], tmp_path: Path) -> None:
    recipe = watched | {"controls": ["joint"]}
    recipe["evaluate"] = [entry | {"stages": ["base", "branch:*"]} for entry in watched["evaluate"]]
    results = spunge.run(recipe, tmp_path / "run")
    spunge.run(recipe | {"watch": None, "evaluate": []}, tmp_path / "plain")
    for folder in ("branches/asia", "branches/europe", "controls/joint"):
        assert delta(tmp_path / "run" / folder) == delta(tmp_path / "plain" / folder)
    curves = {(curve.training, curve.evaluation): curve for curve in results.watched}
    assert len(curves) == len(results.watched) == 6
    for part in ("asia", "europe"):
        curve, beside = curves[f"branch:{part}", "forgotten"], curves[f"branch:{part}", "kept"]
        assert [point.step for point in curve.points] == [0, 2, 4, 5]
        assert (curve.subject, curve.wanted, curve.n, curve.beside) == (part, "up", 12, False)
        assert (beside.subject, beside.wanted, beside.n, beside.beside) == ("retain", "down", 12, True)
        for each, stage, place in ((curve, "base", 0), (beside, "base", 0), (curve, f"branch:{part}", -1)):
            assert each.points[place].value == pytest.approx(results.value(stage, each.subject, "perplexity"), rel=1e-4)
        assert curve.points[0].value < curve.points[-1].value
    joint = curves["control:joint", "forgotten"]
    assert [point.step for point in joint.points] == [0, 2, 4, 6, 8, 10]
    assert (joint.subject, joint.n) == ("all parts", 24)
    assert not (tmp_path / "run" / "watch").exists()
    assert {stage.state for stage in status(tmp_path / "run")} == {"done"}
    told = spunge.plan(recipe | {"watch": None}, tmp_path / "run").stages
    assert all(stage.done for stage in told if stage.work.startswith("unlearn"))  # to watch or not trains nothing again
    heard = Told()
    spunge.run(recipe | {"controls": []}, tmp_path / "plain", heard)
    assert "watch: 2 finished trainings were not watched: no curve of them" in heard.lines
    assert not any(line.startswith("unlearn") for line in heard.lines)


def test_a_finished_training_that_was_measured_otherwise_is_told_and_not_trained_again(
    watched: dict[str, Any], tmp_path: Path
) -> None:
    spunge.run(
        watched | {"evaluate": [entry | {"stages": ["base"]} for entry in watched["evaluate"]]}, tmp_path / "run"
    )

    def remarks(*edits: str) -> list[str]:
        return list(unwatched(build(load_recipe(watched, edits), tmp_path / "run")))

    assert remarks() == remarks("watch.beside.share=0.5") == []
    otherwise = (
        "watch: 2 finished trainings were measured otherwise: the curves of them are what the recipe asked for then"
    )
    edits = (
        "watch.every=3",
        "watch.limit=5",
        "watch.beside=null",
        "watch.evaluation=kept",
        "evaluate.1.where=text like '%a%'",
    )
    assert [remarks(edit) for edit in edits] == [[otherwise]] * len(edits)


@pytest.mark.thorough
def test_controls_of_several_trainings_are_watched_one_by_one(watched: dict[str, Any], tmp_path: Path) -> None:
    recipe = watched | {"controls": ["sequential", "random"]}
    results = spunge.run(recipe, tmp_path / "run")
    plain = spunge.run(recipe | {"watch": None}, tmp_path / "plain")
    deltas = sorted(file.relative_to(tmp_path / "run") for file in (tmp_path / "run").rglob("delta.safetensors"))
    assert len(deltas) == 6
    assert all((tmp_path / "run" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes() for file in deltas)
    assert results.rows == plain.rows
    assert plain.watched == ()
    curves = {(curve.training, curve.evaluation): curve for curve in results.watched}
    dealt = curves["control:random/random-1", "forgotten"]
    assert (dealt.subject, dealt.n) == ("all parts", 24)
    first, second = curves["control:sequential/asia", "kept"], curves["control:sequential/europe", "kept"]
    assert second.points[0].value == pytest.approx(first.points[-1].value, rel=1e-4)


@pytest.mark.parametrize("method", ["rmu", pytest.param("tvn", marks=pytest.mark.thorough)])
def test_a_method_that_needs_less_or_saves_the_opposite_is_measured_as_it_is_judged(
    watched: dict[str, Any], method: str, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    # RMU trains on a model's first blocks, in float32 where that is in 16 bits; TVN trains the opposite of what it saves.
    few = {"steps": 2, "learning_rate": 0.02, "batch_size": 6}
    settings = {"rmu": {"layer": 2}, "tvn": {"strength": 0.5, "trainable": LORA}}[method]
    if method == "rmu":
        watched["model"] = {"path": str(tiny("llama", torch.bfloat16)), "dtype": "bfloat16"}
    recipe = watched | {"unlearn": {"method": method, **few, **settings}, "split": {"by": "topic", "values": ["asia"]}}
    results = spunge.run(recipe, tmp_path / "run")
    spunge.run(recipe | {"watch": None, "evaluate": []}, tmp_path / "plain")
    assert delta(tmp_path / "run" / "branches" / "asia") == delta(tmp_path / "plain" / "branches" / "asia")
    for curve in results.watched:
        assert curve.points[-1].value == pytest.approx(
            results.value("branch:asia", curve.subject, "perplexity"), rel=1e-4
        )
        assert curve.points[-1].value != curve.points[0].value


class Killed(Silent):
    """Ends a run at the first measurement after a step of a training."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, count: int, total: int, note: str = "") -> None:
        if count == self.after and "perplexity" in note:
            raise KeyboardInterrupt


def test_the_best_step_that_keeps_enough_is_that_of_a_training_that_ends_there_also_after_a_kill(
    watched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.unlearning.method.Task.save_seconds", 0.0)
    suffers = {"kind": "tensors", "match": ["*.mlp.down_proj.weight", "lm_head.weight"]}
    ascent = watched["unlearn"] | {"steps": 8, "learning_rate": 0.01, "trainable": suffers}
    only = {"split": {"by": "topic", "values": ["asia"]}, "unlearn": ascent}
    watch = watched["watch"] | {"every": 1, "keep": "best", "limit": None}
    recipe = watched | only | {"watch": watch}
    with pytest.raises(KeyboardInterrupt):
        spunge.run(recipe, tmp_path / "killed", Killed(6))
    heard = Told()
    results = spunge.run(recipe, tmp_path / "killed", heard)
    curve, beside = results.watched
    assert [step for step, _ in points(curve)] == list(range(9))
    enough = [step for step, value in points(beside) if step and beside.points[0].value / value >= 0.9]
    best = max(enough, key=lambda step: curve.points[step].value)
    assert 0 < len(enough) < 8
    assert (curve.kept, curve.trained, curve.reached, curve.asked) == (best, 8, True, 0.9)
    assert curve.share == pytest.approx(beside.points[0].value / beside.points[best].value)
    assert f"{best} steps (the best of 8)" in heard.lines
    short = watched | only | {"watch": None, "unlearn": recipe["unlearn"] | {"steps": best}, "evaluate": []}
    spunge.run(short, tmp_path / "short")
    assert delta(tmp_path / "short" / "branches" / "asia") == delta(tmp_path / "killed" / "branches" / "asia")

    # What chose the step is judged nowhere.
    [line] = lineups(load_recipe(recipe), tmp_path / "killed")
    judged = {entry.rows for entry in results.evaluations}
    for each in results.watched:
        chosen = line.inputs.base.watched_items(each.evaluation)
        assert each.rows not in judged
        theirs = {items.name: items for items in line.inputs.base.evaluations}[each.evaluation]
        texts = [set(items.table["text"].to_pylist()) for items in (chosen, theirs)]
        assert texts[0].isdisjoint(texts[1])
    assert verify(tmp_path / "killed").problems == []


def test_where_no_step_keeps_enough_the_one_that_keeps_most_is_kept_and_that_is_said(
    watched: dict[str, Any], tmp_path: Path
) -> None:
    watched["watch"] = watched["watch"] | {"keep": "best", "beside": BESIDE | {"share": 5.0}}
    heard = Told()
    results = spunge.run(watched | {"split": {"by": "topic", "values": ["asia"]}}, tmp_path / "run", heard)
    curve, beside = results.watched
    most = min(beside.points[1:], key=lambda point: point.value)
    assert (curve.kept, curve.reached) == (most.step, False)
    assert any("no step keeps 500.0% of perplexity; this one keeps most" in line for line in heard.lines)


@pytest.mark.parametrize(
    ("value", "beside", "rank"),
    [
        (20.0, 10.0, (1.0, 20.0)),
        (20.0, 11.0, (0.0, 10 / 11)),
        (float("nan"), 10.0, (1.0, float("-inf"))),
        (20.0, float("inf"), (0.0, 0.0)),
    ],
)
def test_a_step_ranks_by_the_metric_where_enough_is_kept_and_else_by_what_is_kept(
    value: float, beside: float, rank: tuple[float, float]
) -> None:
    nan = float("nan")
    before = (Reading(15.0, nan, nan, "up"), Reading(10.0, nan, nan, "down"))
    readings = (Reading(value, nan, nan, "up"), Reading(beside, nan, nan, "down"))
    assert ranked(readings, before, 0.95) == pytest.approx(rank)
    assert ranked((Reading(value, nan, nan, "down"),), before[:1], None)[0] == 1.0


@pytest.mark.parametrize(
    ("every", "steps"),
    [(3, 3), ("3", 3), ("3 steps", 3), ("1 epoch", 2), ("0.5 epochs", 1), ("2 epochs", 4), ("1epoch", 2)],
)
def test_an_interval_is_of_steps_or_of_epochs(
    watched: dict[str, Any], every: int | str, steps: int, tmp_path: Path
) -> None:
    [line] = lineups(load_recipe(watched | {"watch": watched["watch"] | {"every": every}}), tmp_path)
    assert [steps_between(training, line.inputs) for training in line.trainings] == [steps, steps]  # 12 rows, 6 a step
    assert Watch.model_validate(watched["watch"] | {"every": every}).every in (3, "1 epoch", "0.5 epochs", "2 epochs")


def test_a_few_items_of_each_part_are_the_same_in_every_training(watched: dict[str, Any], tmp_path: Path) -> None:
    recipe = watched | {"watch": watched["watch"] | {"limit": 4}, "controls": ["joint"]}
    [line] = lineups(load_recipe(recipe), tmp_path)
    texts = []
    for training in line.trainings:
        curve, beside = curves_of(training, line.inputs)
        assert len(beside.members) == 4
        texts.append({curve.items.table["text"][int(item)].as_py() for item in curve.members})
    assert [len(each) for each in texts] == [4, 4, 8]
    assert texts[2] == texts[0] | texts[1]


def test_a_plan_tells_how_often_a_training_is_measured_and_what_that_takes(
    watched: dict[str, Any], tmp_path: Path
) -> None:
    work = spunge.plan(watched, tmp_path / "run").stages[0].work
    assert work.startswith("unlearn asia (5 steps, measured 4 times), and ")
    assert work.endswith(" to watch it")
    graph = build(load_recipe(watched), tmp_path / "run").graph
    plain = build(load_recipe(watched, ["watch=null"]), tmp_path / "run").graph
    cost, without = graph.stages["branch:asia"].cost(), plain.stages["branch:asia"].cost()
    assert cost.watched > 0 == without.watched
    assert cost.tokens == without.tokens


WRONG = {
    "watch.evaluation=forgoten": "watch.evaluation: no evaluation is called 'forgoten'; did you mean 'forgotten'",
    "watch.metric=perplexty": "watch.metric: the evaluation 'forgotten' measures no 'perplexty'; did you mean",
    "watch.subject=africa": "watch.subject: 'forgotten' has no 'africa'",
    "watch.beside.evaluation=keptt": "watch.beside.evaluation: no evaluation is called 'keptt'",
    "watch.beside.evaluation=forgotten": "watch.beside.subject: missing, and 'forgotten' has several: europe, asia",
    "watch.beside={evaluation: forgotten, metric: perplexity, subject: asia}": "'asia' is to be forgotten",
    "watch.every=0": "watch.every: 0: give 1 step or more",
    "watch.every=often": "watch.every: 'often' is neither steps nor epochs",
    "watch.every=true": "watch.every",
    "watch.keep=worst": "watch.keep",
    "evaluate.0.where=topic = 'europe'": "watch.subject: 'forgotten' has no items of the part 'asia'",
    "evaluate.0={kind: similarity, name: forgotten}": "compares with what the base wrote",
    "evaluate.0={kind: lm_eval, name: forgotten, tasks: [x]}": "brings items of its own",
    "evaluate.0={kind: match, name: forgotten, prompt: text, words: [a], generation: {engine: vllm}}": "writes by vllm",
    "unlearn={method: precomputed, branches: {asia: x, europe: y}}": "'precomputed' trains nothing",
    "unlearn.packing=true": "of packed texts an epoch's length is known too late",
}


@pytest.mark.parametrize("edit", WRONG)
def test_a_watch_that_cannot_be_is_one_line_before_any_training(
    watched: dict[str, Any], edit: str, tmp_path: Path
) -> None:
    heard, edits = Told(), [edit]
    if "packing" in edit:
        edits.append("watch.every=1 epoch")
    with pytest.raises(RecipeError, match=WRONG[edit]) as raised:
        spunge.run(load_recipe(watched, edits), tmp_path / "run", heard)
    assert "\n" not in str(raised.value)
    assert not any(line.startswith("unlearn") for line in heard.lines)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            ["evaluate.0.subject=both", "watch.subject=both", "evaluate.0.where=SOME"],
            "which way 'perplexity' is good on",
        ),
        (
            ["evaluate.0.limit=1", "split.values=[asia]"],
            "watch.evaluation: 'forgotten' has 1 item of .* all in one half",
        ),
    ],
)
def test_a_step_that_cannot_be_chosen_is_one_line_before_any_training(
    watched: dict[str, Any], edits: list[str], message: str, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    heard = Told()
    forgotten = [json.loads(line) for line in Path(watched["forget"]["source"]).read_text().splitlines()]
    mixed = write_rows("mixed.jsonl", [*forgotten, *rows(["other"])])
    edits = [edit.replace("evaluate.0.where=SOME", f"evaluate.0.source={mixed}") for edit in edits]
    with pytest.raises(RecipeError, match=message):
        spunge.run(load_recipe(watched, [*edits, "watch.keep=best", "watch.beside=null"]), tmp_path / "run", heard)
    assert not any(line.startswith("unlearn") for line in heard.lines)


def test_a_step_that_is_the_best_in_another_way_has_another_key(watched: dict[str, Any], tmp_path: Path) -> None:
    watched["watch"] |= {"keep": "best", "evaluation": "kept", "subject": "retain", "beside": None}
    found = []
    for group in ("keep", "forget"):
        [line] = lineups(load_recipe(watched, [f"evaluate.1.group={group}"]), tmp_path)
        found.append(watching_inputs(line.trainings[0], line.inputs))
    assert found[0]["watched items"] != found[1]["watched items"]


def test_a_search_chooses_no_steps(watched: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    watched["unlearn"]["learning_rate"] = {"low": 0.01, "high": 0.02}
    watched["watch"] |= {"keep": "best"}
    goals = ["forgotten/perplexity/asia", "kept/perplexity/retain"]
    with pytest.raises(RecipeError, match=r"watch\.keep: best: a step chosen in each trial"):
        spunge.tune(watched, 1, goals, tmp_path / "run")
