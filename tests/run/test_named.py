"""Names in a recipe that match nothing: stages, metrics and subjects of evaluations, of calibrations and of published figures."""

from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.run.inputs import BaseInputs
from spunge.run.named import refuse_twice
from toys import Told


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["merged", "control:jiont"], "no stage is called 'control:jiont'; did you mean 'control:joint'"),
        (["contrl:*"], r"no stage is called 'contrl:\*'"),
        (["merge"], "no stage is called 'merge'; did you mean 'merged'"),
        (["untaught"], "no stage is called 'untaught'"),
        (["reference:retrained"], "no stage is called 'reference:retrained'"),
    ],
)
def test_an_evaluation_of_a_stage_that_the_recipe_has_not_is_refused(
    toy_recipe: dict[str, Any], stages: list[str], message: str
) -> None:
    toy_recipe["evaluate"][1]["stages"] = stages
    with pytest.raises(RecipeError, match=f"evaluate.stages: 'perplexity': {message}"):
        load_recipe(toy_recipe)


@pytest.mark.parametrize("stages", [["base", "control:*"], ["reference:*", "merged"], ["branch:*"], ["*"]])
def test_all_of_a_kind_may_be_none(toy_recipe: dict[str, Any], stages: list[str]) -> None:
    toy_recipe["evaluate"][1]["stages"] = stages
    load_recipe(toy_recipe | {"controls": []})


def test_an_evaluation_of_a_branch_that_there_is_not_is_refused(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["evaluate"][1]["stages"] = ["branch:asia", "branch:europa"]
    told = Told()
    with pytest.raises(
        RecipeError, match=r"'branch:europa'; did you mean 'branch:europe'\?; the branches are branch:asia"
    ):
        spunge.run(toy_recipe, tmp_path / "run", told)
    assert not any(line.startswith("unlearn") for line in told.lines)


@pytest.mark.parametrize(("stages", "refused"), [(None, True), (["merged"], True), (["branch:*"], False)])
def test_two_evaluations_that_will_report_one_metric_on_one_subject_are_refused_before_training(
    toy_recipe: dict[str, Any], tmp_path: Path, stages: list[str] | None, refused: bool
) -> None:
    source = toy_recipe["evaluate"][0]["source"]
    about = {"source": source, "prompt": "question"}
    toy_recipe["evaluate"] = [
        {"kind": "leakage", "name": "leaks", "answer": "question", "stages": ["base", "merged"], **about},
        {"kind": "refusal", "name": "declined", "scorer": "keywords", "stages": stages, **about},
    ]
    evaluations = BaseInputs(load_recipe(toy_recipe), tmp_path / "run").evaluations
    there = ["base", "branch:asia", "merged"]
    if not refused:
        refuse_twice(evaluations, there)
        return
    with pytest.raises(
        RecipeError, match=r"evaluate.subject: 'leaks' and 'declined' both report 'empty' on 'europe'; give"
    ):
        refuse_twice(evaluations, there)


def test_a_calibrations_metric_is_known_before_the_base_is_taught(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    teach = {"source": toy_recipe["forget"]["source"], "text": "text", "epochs": 1}
    calibrate = {"evaluation": "perplexity", "metric": "perplexty"}
    told = Told()
    with pytest.raises(
        RecipeError, match=r"calibrate.metric: the evaluation 'perplexity' measures no 'perplexty'; did"
    ):
        spunge.run(toy_recipe | {"teach": teach, "calibrate": calibrate}, tmp_path / "run", told)
    assert not any("teach" in line for line in told.lines)


@pytest.mark.parametrize(
    ("figure", "remark"),
    [
        ({"stage": "control:joynt"}, "control:joynt/asia/accuracy: no stage is called 'control:joynt'; did you mean"),
        ({"metric": "acuracy"}, "base/asia/acuracy: no evaluation measures 'acuracy'; did you mean 'accuracy'"),
        ({"subject": "asai"}, "base/asai/accuracy: no subject 'asai' is measured there; did you mean 'asia'"),
    ],
)
def test_a_published_figure_that_nothing_will_stand_beside_is_told_at_once_and_at_the_end(
    toy_recipe: dict[str, Any], finished: Path, figure: dict[str, str], remark: str
) -> None:
    right = {"stage": "base", "subject": "asia", "metric": "accuracy", "value": 0.5, "source": "a paper"}
    told = Told()
    spunge.run(toy_recipe | {"published": [right, {**right, **figure}]}, finished, told)
    [line] = [line for line in told.lines if line.startswith("published:")]
    assert f"nothing of this run stands beside {remark}" in line
    [end] = [line for line in told.lines if " scores" in line]
    assert "nothing stands beside 1 of 2 published figures (first: " in end
