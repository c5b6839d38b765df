"""A model that never saw the rows to forget, beside the base and the merged one: made by the same teaching, or given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ks_2samp

import spunge
from making import read
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.report.text import report_text
from spunge.run.status import status
from spunge.run.verify import verify
from toys import Told, rows

TEACH = {"steps": 4, "learning_rate": 0.01, "batch_size": 8}


@pytest.fixture
def referred(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Two topics are taught, one of them is to be forgotten; the reference is taught the other one alone."""
    forget = {**toy_recipe["forget"], "where": "topic = 'asia'"}
    toy_recipe["unlearn"]["steps"] = 1
    judged = {"kind": "perplexity", "source": toy_recipe["retain"]["source"], "subject": "plain", "by": "NULL"}
    return toy_recipe | {
        "teach": TEACH,
        "forget": forget,
        "reference": "retrained",
        "controls": [],
        "evaluate": [judged],
    }


def begun(recipe: dict[str, Any], *overrides: str) -> spunge.Recipe:
    return load_recipe(recipe, overrides)


def losses(folder: Path) -> list[float]:
    """Of each text of the one evaluation, per token."""
    [file] = folder.glob("*.json")
    [measure] = json.loads(file.read_text())["measures"]
    return [loss / tokens for loss, tokens in zip(measure["numerator"], measure["denominator"], strict=True)]


def test_a_retrained_reference_is_the_teaching_of_the_other_rows_and_is_judged_beside_the_rest(
    referred: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    referred["aggregates"] = {"likeness": {"kind": "ks", "of": {"evaluation": "perplexity", "metric": "perplexity"}}}
    results = spunge.run(begun(referred), out)
    assert results.stages == ("base", "untaught", "reference:retrained", "branch:asia", "merged")
    assert [model.kind for model in results.models][1:3] == ["reference", "reference"]
    assert [model.taught for model in results.models] == [24, None, 12, 24, 24]
    pairs = {(row.stage, row.against) for row in results.differences}
    assert {("reference:retrained", "base"), ("merged", "reference:retrained")} <= pairs
    merged, retrained = (losses(out / "evaluation" / stage) for stage in ("merged", "reference-retrained"))
    assert results.value("merged", "all", "likeness") == pytest.approx(ks_2samp(merged, retrained).pvalue)
    assert {row.stage for row in results.rows if row.evaluation == "likeness"} == {
        "base",
        "untaught",
        "branch:asia",
        "merged",
    }
    # The oracle: a recipe that teaches those rows alone has the reference as its base.
    alone = {
        **referred,
        "reference": None,
        "aggregates": {},
        "evaluate": [],
    }
    spunge.run(begun(alone, "teach.where=\"topic = 'europe'\""), tmp_path / "alone")
    mine, theirs = read(out / "reference"), read(tmp_path / "alone" / "taught")
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    assert verify(out).problems == []
    assert {stage.state for stage in status(out)} == {"done"}
    told = Told()
    spunge.run(begun(referred), out, told)
    assert told.judged == []
    assert "Merged against the retrained reference" in report_text(results)
    assert "the retrained reference" in (out / "report.html").read_text()


def test_a_given_reference_is_judged_as_it_is(
    referred: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    """Of another architecture too: it is loaded by itself."""
    other = tiny("gpt2")
    recipe = {**referred, "teach": None, "reference": {"path": str(other), "name": "retain90"}}
    results = spunge.run(begun(recipe), tmp_path / "run")
    assert results.stages == ("base", "reference:retain90", "branch:asia", "merged")
    alone = spunge.judge([other], recipe, out=tmp_path / "alone")
    assert alone.stages == ("base",)  # which the reference is here
    value = results.value("reference:retain90", "plain", "perplexity")
    assert value == pytest.approx(alone.value("base", "plain", "perplexity"), rel=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"teach": None}, "the recipe teaches nothing; give teach, or reference.path"),
        ({"reference": "retraind"}, "write retrained, or {path: retraind}"),
        ({"reference": {"path": "x", "minus": "true"}}, "reference.*minus: a model that exists is not taught"),
        ({"reference": {"minus": "topic = 'mars'"}}, "reference.minus: no row of 24 meets"),
        ({"reference": {"minus": "tpic = 'asia'"}}, "reference.minus: .*did you mean 'topic'"),
        (
            {"reference": {"minus": "topic = 'europe'"}},
            "12 of the rows that it would be taught have the texts of a row",
        ),
        ({"teach": {**TEACH, "where": "topic = 'asia'"}}, "every row that is taught is one to forget"),
        ({"teach": {**TEACH, "where": "topic = 'europe'"}}, "none of the 12 rows that are taught is one to forget"),
        ({"teach": {**TEACH, "text": "' ' || text"}}, "none of the 24 rows that are taught is one to forget"),
        ({"seeds": 2, "forget": {"limit": 3}}, "with forget.limit each of several seeds forgets other rows"),
        ({"reference": {"path": "BASE"}}, "BASE. has the weights of the model before it is taught"),
        ({"teach": None, "reference": {"path": "BASE"}}, "BASE. has the weights of the base itself"),
        ({"reference": {"path": "/nowhere"}}, "reference.path: no folder '/nowhere'"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_any_training(
    referred: dict[str, Any], tmp_path: Path, edit: dict[str, Any], message: str
) -> None:
    if "forget" in edit:
        edit = {**edit, "forget": {**referred["forget"], **edit["forget"]}}
    recipe: dict[str, Any] = {**referred, **edit}
    if isinstance(recipe["reference"], dict) and recipe["reference"].get("path") == "BASE":
        copy = shutil.copytree(recipe["model"]["path"], tmp_path / "BASE")
        recipe["reference"] = {"path": str(copy)}
    told = Told()
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.run(load_recipe(recipe), tmp_path / "run", told)
    assert "\n" not in str(raised.value)
    assert not any(line.startswith(("teach", "unlearn")) for line in told.lines)


def test_rows_that_differ_in_white_space_alone_are_told(
    referred: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    content = rows(["asia", "europe"], 4)
    taught = [
        {**row, "text": row["text"].replace(" ", "  ", 1) if place == 1 else row["text"]}
        for place, row in enumerate(content)
    ]
    recipe = {**referred, "teach": {**TEACH, "source": str(write_rows("taught.jsonl", taught))}}
    recipe["forget"] = {**recipe["forget"], "source": str(write_rows("all.jsonl", content))}
    with pytest.raises(RecipeError, match=r"1 of the rows .* in white space alone \(first: row 2 of taught.jsonl\)"):
        spunge.plan(load_recipe(recipe), tmp_path / "run")
    recipe["reference"] = {"minus": "topic = 'asia'"}
    planned = spunge.plan(load_recipe(recipe), tmp_path / "run")
    assert next(stage.work for stage in planned.stages if stage.stage == "retrained") == "teach 4 rows (4 steps)"


def test_rows_to_forget_that_were_not_taught_are_remarked_on(
    referred: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    content = rows(["asia", "europe"], 4)
    recipe = {**referred, "teach": {**TEACH, "source": str(write_rows("taught.jsonl", content[1:]))}}
    recipe["forget"] = {**recipe["forget"], "source": str(write_rows("all.jsonl", content))}
    notes = spunge.plan(load_recipe(recipe), tmp_path / "run").notes
    assert "reference: 1 of 4 rows to forget are not among those that are taught" in notes
