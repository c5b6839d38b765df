"""Judging models as they are: checkpoints, adapters and deltas, as stages of a run that trains nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from commands import call
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.run.judgement import judging_recipe
from spunge.run.status import status
from spunge.run.verify import verify
from toys import Told


@pytest.mark.thorough
def test_a_runs_models_judged_by_its_recipe_have_the_scores_that_they_have_in_it(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    told = Told()
    out = tmp_path / "judged"
    models = [toy_recipe["model"]["path"], finished / "merged", finished / "branches" / "asia"]
    results = spunge.judge(models, toy_recipe, out=out, watcher=told)
    assert results.stages == ("base", "model:merged", "model:asia")
    assert {model.kind for model in results.models} == {"base", "model"}
    assert not any(line.startswith(("unlearn", "merge", "teach")) for line in told.lines)
    of_the_run = spunge.read_results(finished)
    for mine, theirs in {"base": "base", "model:merged": "merged", "model:asia": "branch:asia"}.items():
        for row in (row for row in of_the_run.rows if row.stage == theirs):
            assert results.value(mine, row.subject, row.metric) == pytest.approx(row.value, rel=1e-6)
    assert {row.group for row in results.rows} == {row.group for row in of_the_run.rows}
    assert {(row.stage, row.against) for row in results.differences} == {
        ("model:merged", "base"),
        ("model:asia", "base"),
    }
    assert verify(out).problems == []
    assert {stage.state for stage in status(out)} == {"done"}
    again = Told()
    spunge.judge(models, toy_recipe, out=out, watcher=again)
    assert again.judged == []
    page = (out / "report.html").read_text()
    assert "against the base" in page
    assert "unlearned by" not in page


def test_one_model_is_judged_by_evaluations_alone_from_the_command_line(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    model, rows = toy_recipe["model"]["path"], toy_recipe["retain"]["source"]
    evaluation = f"{{kind: perplexity, source: {rows}, text: text}}"
    ended = call("judge", model, "--evaluate", evaluation, "--set", "model.dtype=float32", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("judge-")
    results = spunge.read_results(folder)
    # As if it had been stopped before the last stages: nothing is loaded then.
    (folder / "stamps" / "results.json").unlink()
    assert call("judge", model, "--evaluate", evaluation, "--set", "model.dtype=float32", cwd=tmp_path).returncode == 0
    again = spunge.read_results(folder)
    assert (again.device, again.dtype) == (results.device, results.dtype) == ("cpu", "float32")
    run = spunge.run({**toy_recipe, "controls": [], "unlearn": {**toy_recipe["unlearn"], "steps": 1}}, tmp_path / "run")
    assert results.value("base", "all", "perplexity") == pytest.approx(run.value("base", "retain", "perplexity"))
    assert "perplexity" in ended.stdout


def test_an_adapter_is_judged_on_the_model_that_it_names(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    wrapped = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=64, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    whole = wrapped.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    for file in tiny("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "whole")
    results = spunge.judge([tmp_path / "adapter"], toy_recipe, out=tmp_path / "one")
    assert results.stages == ("base", "model:adapter")
    alone = spunge.judge([tmp_path / "whole"], toy_recipe, out=tmp_path / "two")
    value = results.value("model:adapter", "retain", "perplexity")
    assert value == pytest.approx(alone.value("base", "retain", "perplexity"), rel=1e-4)
    assert value != pytest.approx(results.value("base", "retain", "perplexity"), rel=1e-3)


def test_models_of_one_name_are_told_apart_and_every_evaluation_is_asked_of_each(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["evaluate"][0]["stages"] = ["merged"]
    recipe = judging_recipe(["/x/merged", "/y/merged", "owner/merged"], toy_recipe, base="/a/base")
    assert [model.name for model in recipe.judge or ()] == ["merged", "y-merged", "owner-merged"]
    assert recipe.evaluate[0].stages is None
    assert (recipe.unlearn, recipe.controls, recipe.model.path) == (None, [], "/a/base")
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


def test_an_aggregate_against_a_model_that_is_not_judged_is_left_out_and_said(
    toy_recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    of = {"evaluation": "perplexity", "metric": "perplexity", "subject": "retain"}
    toy_recipe |= {"teach": {"steps": 1}, "reference": {"minus": "topic = 'asia'"}}
    toy_recipe["aggregates"] = {"quality": {"kind": "ks", "of": of, "against": "reference:retrained"}}
    toy_recipe["forget"] = {**toy_recipe["forget"], "where": "topic = 'asia'"}
    assert judging_recipe(["/x/one"], toy_recipe, base="/a/base").aggregates == {}
    assert "the aggregate 'quality' is left out" in caplog.text
    chosen = judging_recipe(["/x/one"], toy_recipe, base="/a/base", overrides=["aggregates.quality.against=model:one"])
    assert list(chosen.aggregates) == ["quality"]


def test_a_run_may_judge_other_peoples_models_beside_its_own(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    toy_recipe |= {"judge": [{"name": "theirs", "path": str(finished / "merged")}], "controls": []}
    overrides = ["unlearn.steps=1", "split.values=[asia]"]
    results = spunge.run(load_recipe(toy_recipe, overrides), tmp_path / "mine")
    assert results.stages == ("base", "model:theirs", "branch:asia", "merged")
    assert ("merged", "model:theirs") in {(row.stage, row.against) for row in results.differences}


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["BASE"], {}, "give --recipe, whose evaluations are taken, or --evaluate"),
        ([], {"evaluate": [{}]}, "no model is named"),
        (["/nowhere"], {"recipe": "TOY"}, "no folder '/nowhere'"),
        (["BASE", "/nowhere"], {"recipe": "TOY"}, "judge.0.path: no folder '/nowhere'"),
        (["BASE", "BASE"], {"recipe": "TOY"}, "has the weights of the base itself"),
        (["DELTA"], {"recipe": "TOY"}, "does not say which model it is laid over; give --base"),
        (["OTHER", "DELTA"], {"recipe": "TOY"}, "judge.0.path: .* was made from a base with fingerprint"),
        (
            ["BASE"],
            {"evaluate": [{"kind": "perplexity"}]},
            "evaluate.0.source: missing; the recipe has no rows to forget",
        ),
        (["BASE"], {"evaluate": [{"kind": "perplexty"}]}, "did you mean 'perplexity'"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    toy_recipe: dict[str, Any],
    finished: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    models: list[str],
    options: dict[str, Any],
    message: str,
) -> None:
    places = {"BASE": toy_recipe["model"]["path"], "DELTA": str(finished / "branches" / "asia")}
    places["OTHER"] = str(tiny("llama", torch.bfloat16))
    if options.get("recipe") == "TOY":
        options = {"recipe": toy_recipe}
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.judge([places.get(model, model) for model in models], out=tmp_path / "judged", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "judged" / "results.json").exists()


def test_all_models_are_judged_in_one_arithmetic_where_one_is_still_to_be_downloaded(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in 16 bits is judged in float32 beside one that is written in it."""
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = tmp_path / "models--owner--name"
    shutil.copytree(tiny("gpt2"), hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("spunge.model.loading.bfloat16_speedup", lambda: 2.0)
    run, models = tmp_path / "run", [tiny("llama", dtype=torch.bfloat16), "owner/name"]
    spunge.judge(models, evaluate=toy_recipe["evaluate"][1:], out=run)
    judged = [json.loads(file.read_text()) for file in sorted(run.glob("evaluation/*/*.json"))]
    assert [(each["stage"], each["dtype"]) for each in judged] == [("base", "float32"), ("model:name", "float32")]
    again = Told()
    spunge.judge(models, evaluate=toy_recipe["evaluate"][1:], out=run, watcher=again)
    assert again.judged == []
