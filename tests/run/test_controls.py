"""Controls: each is what it says, trained once, and judged like the rest; several seeds; the base judged once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from spunge.data.split import random_parts, split_rows
from spunge.errors import RecipeError
from spunge.model.loading import load_base
from spunge.progress import Silent
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.recipe.merging import Control
from spunge.report.verdict import _of_its_own
from spunge.run.outcome import described
from spunge.run.stages.building import lineups
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta

NAME = "model.layers.1.mlp.down_proj.weight"


class Recorder(Silent):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def begin(self, title: str) -> None:
        self.titles.append(title)

    def end(self, outcome: str) -> None:
        if outcome == "from the cache":
            self.titles.pop()

    @property
    def worked(self) -> list[str]:
        return [title for title in self.titles if title.split()[0] in ("unlearn", "merge", "judge", "choose")]


def run(recipe: dict[str, Any], out: Path, *overrides: str, replace: bool = False) -> tuple[Any, list[str]]:
    watcher = Recorder()
    return spunge.run(load_recipe(recipe, overrides), out, watcher, replace), watcher.worked


def weight_of(recipe: dict[str, Any], out: Path, stage: str, *overrides: str) -> torch.Tensor:
    """A tensor of the model that is judged as a stage."""
    [line] = lineups(load_recipe(recipe, overrides), out)
    base = load_base(line.inputs.base.folder, line.inputs.recipe.model)
    before = base.parameters[NAME].detach().clone()
    with next(model for model in line.models if model.name == stage).laid_over(base):
        found = base.parameters[NAME].detach().clone()
    assert torch.equal(base.parameters[NAME], before)
    return found


def test_every_model_says_what_made_it(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    ties = {"name": "ties-2", "merge": {"rule": "ties", "density": [0.5, 0.1], "scale": 2}}
    recipe = load_recipe({**toy_recipe, "controls": ["joint", "random", "sequential", ties]}, ["seed=3", "seeds=2"])
    seeds = lineups(recipe, tmp_path)
    models = {model.name: described(model, seeds) for model in seeds[0].models}
    base, merged = models["base"], models["merged"]
    assert (base.base, base.method, base.seeds) == (toy_recipe["model"]["path"], None, None)
    assert {model.base_fingerprint for model in models.values()} == {
        Checkpoint(seeds[0].inputs.base.folder).fingerprint()
    }
    assert (merged.train, merged.parts, merged.seeds) == ("parts", ("asia", "europe"), (3, 4))
    assert (merged.rule, merged.density, merged.scale) == ("ties", recipe.merge.density, 1.0)
    assert merged.method == recipe.unlearn.method
    assert merged.settings is not None
    assert {"method": merged.method, **merged.settings} == recipe.unlearn.model_dump(mode="json")
    assert merged.merge is not None
    rest = {"rule": merged.rule, "density": merged.density, "scale": merged.scale, **merged.merge}
    assert rest == recipe.merge.model_dump(mode="json")
    assert (models["branch:europe"].parts, models["branch:europe"].rule) == (("europe",), None)
    made = {name.partition(":")[2]: model for name, model in models.items() if model.kind == "control"}
    assert [(model.train, model.rule) for model in made.values()] == [
        ("joint", None),
        ("random", "ties"),
        ("sequential", None),
        ("parts", "ties"),
    ]
    assert made["random"].parts == ("random 1", "random 2")
    # A density for each branch is no number, and stands with the rule's other settings.
    assert (made["ties-2"].density, made["ties-2"].scale) == (None, 2.0)
    assert made["ties-2"].merge is not None
    assert made["ties-2"].merge["density"] == [0.5, 0.1]


def test_short_names_stand_for_whole_controls(toy_recipe: dict[str, Any]) -> None:
    given = ["joint", "random", "sequential", "average", {"name": "ties-2", "merge": {"scale": 2}}]
    controls = load_recipe({**toy_recipe, "controls": given}).controls
    assert [(control.name, control.train) for control in controls] == [
        ("joint", "joint"),
        ("random", "random"),
        ("sequential", "sequential"),
        ("average", "parts"),
        ("ties-2", "parts"),
    ]
    assert [control.merge.rule if control.merge else None for control in controls] == [
        None,
        None,
        None,
        "average",
        "ties",
    ]
    recipe = load_recipe({**toy_recipe, "controls": given})
    assert load_recipe(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert "scale: 2.0" in dump_recipe(recipe)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (["jiont"], "no control 'jiont'; did you mean 'joint'"),
        ([{"name": "mine"}], "are `merged`; give merge"),
        ([{"name": "joint", "train": "random"}], "'joint' is kept for"),
        ([{"name": "joint", "train": "joint", "merge": {"scale": 2}}], "'joint' is kept for"),
        ([{"name": "../x", "train": "joint"}], "controls.0.name"),
        (["joint", "joint"], "two controls are called 'joint'"),
        ([{"name": "a", "merge": {"rule": "tise"}}], "did you mean 'ties'"),
    ],
)
def test_controls_that_make_no_sense_are_refused(toy_recipe: dict[str, Any], controls: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**toy_recipe, "controls": controls})


def test_a_random_split_deals_out_the_same_rows_in_parts_of_the_same_sizes(toy_recipe: dict[str, Any]) -> None:
    parts = split_rows(load_recipe({**toy_recipe, "forget": {**toy_recipe["forget"], "limit": 7}})).parts
    dealt = random_parts(parts, 3)
    assert [len(part.samples) for part in dealt] == [len(part.samples) for part in parts] == [7, 7]
    texts = [
        sorted(text for part in side for text in part.samples.table["text"].to_pylist()) for side in (parts, dealt)
    ]
    assert texts[0] == texts[1]
    own = set(parts[0].samples.table["text"].to_pylist())
    mixed = [len(own & set(part.samples.table["text"].to_pylist())) for part in dealt]
    assert all(mixed), "each random part should hold rows of both"
    again = random_parts(parts, 3)
    assert [part.samples.sha256 for part in again] == [part.samples.sha256 for part in dealt]
    assert [part.samples.sha256 for part in random_parts(parts, 4)] != [part.samples.sha256 for part in dealt]


def test_every_control_is_trained_once_and_judged_as_a_stage(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    twice = "{name: joint-2, train: joint, merge: {rule: task_arithmetic, scale: 2}}"
    controls = f"controls=[joint, random, sequential, average, {twice}]"
    results, worked = run(toy_recipe, tmp_path / "run", controls)
    assert [title for title in worked if title.startswith("unlearn")] == [
        "unlearn branch:asia",
        "unlearn branch:europe",
        "unlearn control:joint",
        "unlearn control:random/random-1",
        "unlearn control:random/random-2",
        "unlearn control:sequential/asia",
        "unlearn control:sequential/europe",
    ]
    stages = ["base", "branch:asia", "branch:europe"]
    stages += [f"control:{name}" for name in ("joint", "random", "sequential", "average", "joint-2")]
    assert results.content["stages"] == [*stages, "merged"]
    assert {row.stage for row in results.rows} == {*stages, "merged"}
    _, again = run(toy_recipe, tmp_path / "run", controls)
    assert again == []
    planned = spunge.plan(load_recipe(toy_recipe, [controls]), tmp_path / "run")
    assert all(stage.done for stage in planned.stages)
    assert len(planned.stages) == 7 + 1 + 9


def test_a_joint_control_at_twice_the_scale_moves_twice_as_far(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    controls = "controls=[joint, {name: joint-2, train: joint, merge: {rule: task_arithmetic, scale: 2}}]"
    run(toy_recipe, tmp_path / "run", controls, "evaluate=[]")
    base, once, twice = (
        weight_of(toy_recipe, tmp_path / "run", stage, controls)
        for stage in ("base", "control:joint", "control:joint-2")
    )
    assert not torch.equal(base, once)
    torch.testing.assert_close(twice - base, 2 * (once - base), rtol=1e-3, atol=1e-6)


def test_an_average_control_is_the_mean_of_the_branches(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    run(toy_recipe, tmp_path / "run", "controls=[average]", "evaluate=[]")
    base, mean = (
        weight_of(toy_recipe, tmp_path / "run", stage, "controls=[average]") for stage in ("base", "control:average")
    )
    deltas = [open_delta(tmp_path / "run" / "branches" / name).dense(NAME) for name in ("asia", "europe")]
    torch.testing.assert_close(mean, base + (deltas[0] + deltas[1]) / 2)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["rmu", "tvn"])
def test_a_sequential_control_trains_each_part_from_the_model_before(
    toy_recipe: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """The oracle: a run on the second part alone whose base is the checkpoint that the first part's run wrote."""
    toy_recipe["unlearn"] = {"method": method, "steps": 3, "batch_size": 4, "learning_rate": 0.01}
    toy_recipe["unlearn"] |= {"layer": 2} if method == "rmu" else {}
    toy_recipe["evaluate"] = []
    run(toy_recipe, tmp_path / "run", "controls=[sequential]")
    whole = ["controls=[]", "merge={rule: task_arithmetic}"]
    run(toy_recipe, tmp_path / "first", "split.values=[asia]", *whole)
    run(toy_recipe, tmp_path / "second", "split.values=[europe]", f"model.path={tmp_path / 'first' / 'merged'}", *whole)
    last = weight_of(toy_recipe, tmp_path / "run", "control:sequential", "controls=[sequential]")
    overrides = ["split.values=[europe]", f"model.path={tmp_path / 'first' / 'merged'}", *whole]
    expected = weight_of(toy_recipe, tmp_path / "second", "merged", *overrides)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-6)


def test_changing_the_first_part_trains_all_that_follows_in_the_sequence(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "forget.jsonl"
    lines = Path(toy_recipe["forget"]["source"]).read_text().splitlines()
    file.write_text("\n".join(lines))
    toy_recipe["forget"]["source"] = str(file)
    run(toy_recipe, tmp_path / "run", "controls=[sequential]", "evaluate=[]")
    lines.remove(next(line for line in lines if '"asia"' in line))
    file.write_text("\n".join(lines))
    _, worked = run(toy_recipe, tmp_path / "run", "controls=[sequential]", "evaluate=[]", replace=True)
    assert [title for title in worked if title.startswith("unlearn")] == [
        "unlearn branch:asia",
        "unlearn control:sequential/asia",
        "unlearn control:sequential/europe",
    ]


def test_precomputed_branches_have_no_sequence(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    run(toy_recipe, tmp_path / "run", "evaluate=[]")
    branches = {name: str(tmp_path / "run" / "branches" / name) for name in ("asia", "europe")}
    given = {**toy_recipe, "unlearn": {"method": "precomputed", "branches": branches}, "controls": ["sequential"]}
    with pytest.raises(RecipeError, match="leave `sequential` out"):
        spunge.run(load_recipe(given), tmp_path / "again")


@pytest.mark.thorough
def test_several_seeds_give_means_with_their_spread(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["unlearn"]["learning_rate"] = 0.1
    results, _ = run(toy_recipe, tmp_path / "run", "seeds=3")
    assert results.content["seeds"] == 3
    assert sorted(folder.name for folder in (tmp_path / "run" / "seeds").iterdir()) == ["4", "5"]
    values = []
    for seed in (3, 4, 5):
        alone, _ = run(toy_recipe, tmp_path / f"alone-{seed}", f"seed={seed}")
        values.append(alone.value("merged", "retain", "perplexity"))
    assert len(set(values)) == 3
    row = next(r for r in results.rows if (r.stage, r.metric) == ("merged", "perplexity"))
    assert row.value == pytest.approx(sum(values) / 3)
    assert row.spread == pytest.approx(float(torch.tensor(values, dtype=torch.float64).std()))
    base = next(r for r in results.rows if (r.stage, r.metric) == ("base", "perplexity"))
    assert base.spread is None
    _, again = run(toy_recipe, tmp_path / "run", "seeds=3")
    assert again == []
    _, more = run(toy_recipe, tmp_path / "run", "seeds=4")
    assert all("base" not in title for title in more)
    assert sum(title.startswith("unlearn") for title in more) == 3


@pytest.mark.thorough
def test_the_base_is_judged_once_across_runs(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    first, worked = run(toy_recipe, tmp_path / "one")
    assert sum(title.startswith("judge base") for title in worked) == 2
    second, worked = run(toy_recipe, tmp_path / "two", "unlearn.alpha=7")
    assert not any(title.startswith("judge base") for title in worked)
    assert [row for row in first.rows if row.stage == "base"] == [row for row in second.rows if row.stage == "base"]
    _, worked = run(toy_recipe, tmp_path / "three", "evaluate.0.normalize=characters", "unlearn.alpha=8")
    assert [title for title in worked if title.startswith("judge base")] == ["judge base: choices"]


def test_an_evaluation_may_be_of_some_stages_alone(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    results, _ = run(toy_recipe, tmp_path / "run", "evaluate.0.stages=[base, 'control:*']")
    judged = {(row.stage, row.metric) for row in results.rows}
    assert {stage for stage, metric in judged if metric == "accuracy"} == {"base", "control:joint"}
    assert {stage for stage, metric in judged if metric == "perplexity"} == set(results.content["stages"])


def test_results_hold_paired_differences(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    results, _ = run(toy_recipe, tmp_path / "run", "unlearn.learning_rate=0.1")
    pairs = {(row["stage"], row["against"]) for row in results.content["differences"]}
    stages = ["branch:asia", "branch:europe", "control:joint", "merged"]
    assert pairs == {*((stage, "base") for stage in stages), ("merged", "control:joint")}
    row = next(
        r
        for r in results.content["differences"]
        if (r["stage"], r["against"], r["metric"], r["subject"]) == ("merged", "base", "perplexity", "retain")
    )
    assert row["kind"] == "ratio"
    ratio = results.value("merged", "retain", "perplexity") / results.value("base", "retain", "perplexity")
    assert row["value"] == pytest.approx(ratio)
    assert row["low"] <= row["value"] <= row["high"]


def test_a_control_needs_a_mapping_with_a_name() -> None:
    assert Control(name="a", train="joint").merge is None


def test_two_evaluations_that_report_the_same_are_named(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    twin = {**toy_recipe["evaluate"][1], "name": "again"}
    with pytest.raises(RecipeError, match="both report perplexity on 'retain'"):
        run({**toy_recipe, "evaluate": [*toy_recipe["evaluate"], twin]}, tmp_path / "run")


OWN = {"name": "tuned", "train": "joint", "learning_rate": 0.004, "steps": 5}


def test_a_joint_control_of_its_own_is_the_run_with_these_settings(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["evaluate"] = []
    results, worked = run({**toy_recipe, "controls": ["joint", OWN]}, tmp_path / "own")
    assert [title for title in worked if "control" in title] == ["unlearn control:joint", "unlearn control:tuned"]
    changes = [f"unlearn.learning_rate={OWN['learning_rate']}", f"unlearn.joint_steps={OWN['steps']}"]
    other, _ = run({**toy_recipe, "controls": ["joint"]}, tmp_path / "other", *changes)
    mine, theirs = (
        open_delta(folder / "controls" / name) for folder, name in ((results.folder, "tuned"), (other.folder, "joint"))
    )
    assert (results.folder / "controls/tuned/delta.safetensors").read_bytes() == (
        other.folder / "controls/joint/delta.safetensors"
    ).read_bytes()
    assert mine.info["steps"] == theirs.info["steps"] == 5
    by_name = {model.name: model for model in results.models if model.kind in ("control", "merged")}
    fact = _of_its_own(by_name["tuned"], [by_name["merged"]])
    assert fact is not None
    assert "a learning rate of 0.004 (" in fact.text
    assert "joint steps 5" in fact.text
    assert _of_its_own(by_name["joint"], [by_name["merged"]]) is None
    told = {label: model.settings for label, model in by_name.items()}
    assert told["tuned"]["learning_rate"] == 0.004
    assert told["joint"]["learning_rate"] == told["merged"]["learning_rate"] != 0.004
    _, worked = run({**toy_recipe, "controls": ["joint", {**OWN, "steps": 6}]}, tmp_path / "own", replace=True)
    assert [title for title in worked if title.startswith("unlearn")] == ["unlearn control:tuned"]


@pytest.mark.parametrize(
    ("controls", "told"),
    [
        ([{"name": "dealt", "train": "random", "steps": 3}], "steps: a joint control alone has its own"),
        (
            [{"name": "joint", "train": "joint", "steps": 3}, {"name": "again", "train": "joint"}],
            "give the first another",
        ),
    ],
)
def test_settings_of_its_own_that_a_control_cannot_have_are_refused(
    toy_recipe: dict[str, Any], tmp_path: Path, controls: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        lineups(load_recipe({**toy_recipe, "controls": controls}), tmp_path)
