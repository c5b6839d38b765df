"""Calibration: every arm gets the largest scale that keeps a share of the base's metric, on items that are then not judged."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import spunge
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.memorization import MEMORIZATION
from spunge.model.loading import load_base
from spunge.recipe.calibration import Calibrate
from spunge.recipe.loading import load_recipe
from spunge.report.text import report_text
from spunge.run.calibrate import _scaled, bisected, kept_share
from spunge.run.stages.building import build, lineups
from spunge.run.stages.models import _calibration
from spunge.run.status import status
from spunge.run.verify import verify
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from toys import Told

KEEP = {"evaluation": "perplexity", "metric": "perplexity", "keep": 0.9, "tries": 7}
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def calibrated(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Gradient ascent, which a random model's perplexity suffers from."""
    trainable = {"kind": "tensors", "match": ["*.mlp.down_proj.weight", "lm_head.weight"]}
    ascent = {"method": "ga", "steps": 4, "learning_rate": 0.01, "batch_size": 6, "trainable": trainable}
    toy_recipe["unlearn"] = ascent
    return toy_recipe | {"calibrate": KEEP, "controls": ["joint", "sequential"], "evaluate": toy_recipe["evaluate"][1:]}


@pytest.fixture(scope="module")
def _kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def done(
    calibrated: dict[str, Any], _kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Path:
    """The folder of a finished run of `calibrated`: a copy."""
    if not _kept:
        _kept["run"] = tmp_path_factory.mktemp("calibrated") / "run"
        spunge.run(calibrated, _kept["run"])
    return Path(shutil.copytree(_kept["run"], tmp_path / "run"))


def test_a_calibration_is_told_by_the_name_that_its_evaluation_has_now(calibrated: dict[str, Any], done: Path) -> None:
    [entry] = calibrated["evaluate"]
    heard, calibrate = Told(), {**KEEP, "evaluation": "kept"}
    results = spunge.run(calibrated | {"evaluate": [{**entry, "name": "kept"}], "calibrate": calibrate}, done, heard)
    told = {each.evaluation for model in results.models for each in model.calibration or ()}
    assert told == {"kept"} == {row.evaluation for row in results.rows}
    assert not any(line.startswith(("calibrate", "unlearn")) for line in heard.lines)


def test_a_scale_that_becomes_another_judges_anew_every_model_that_has_it(
    calibrated: dict[str, Any], done: Path, tmp_path: Path
) -> None:
    before = {model.stage: model.scale for model in spunge.read_results(done).models if model.calibration}
    other = calibrated | {"calibrate": {**KEEP, "keep": 0.6}}
    again, anew = spunge.run(other, done), spunge.run(other, tmp_path / "anew")
    after = {model.stage: model.scale for model in again.models if model.calibration}
    assert after.keys() == before.keys() >= {"control:joint", "control:sequential", "merged"}
    assert all(after[stage] != before[stage] for stage in after)
    assert again.rows == anew.rows


@pytest.mark.parametrize("crossing", [0.01, 0.3, 1.1, 2.4, 3.999])
def test_bisection_ends_at_the_largest_scale_that_keeps_enough(crossing: float) -> None:
    settings = Calibrate(evaluation="e", metric="m", keep=0.5, tolerance=0, tries=20)
    tried = []

    def share(scale: float) -> float:
        tried.append(scale)
        return 0.5 ** (scale / crossing)

    point = bisected(share, settings)
    assert point.bound is None
    assert point.scale <= crossing
    assert point.scale == pytest.approx(crossing, abs=4.0 / 2**19)
    assert len(tried) == len(set(tried)) == 20


@pytest.mark.parametrize(("kept", "bound", "scale"), [(0.99, "high", 4.0), (0.1, "low", 0.5)])
def test_a_point_that_no_scale_reaches_ends_at_the_bound(kept: float, bound: str, scale: float) -> None:
    point = bisected(lambda _: kept, Calibrate(evaluation="e", metric="m", tries=4))
    assert point == (scale, kept, bound)


def test_what_is_near_enough_is_not_tried_further() -> None:
    tried: list[float] = []

    def share(scale: float) -> float:
        tried.append(scale)
        return 1 - scale / 40

    assert bisected(share, Calibrate(evaluation="e", metric="m", keep=0.95, tries=8)).scale == 2.0
    assert tried == [4.0, 2.0]


@pytest.mark.parametrize(
    ("value", "base", "way", "share"), [(0.6, 0.8, "up", 0.75), (20, 16, "down", 0.8), (math.inf, 16, "down", 0.0)]
)
def test_the_share_that_is_kept(value: float, base: float, way: Any, share: float) -> None:
    assert kept_share(value, base, way) == pytest.approx(share)
    assert kept_share(math.nan, base, way) == 0


@pytest.mark.thorough
def test_every_arm_stands_at_its_own_scale_and_keeps_the_share_there(calibrated: dict[str, Any], done: Path) -> None:
    results = spunge.read_results(done)
    arms = {model.stage: model for model in results.models if model.calibration}
    assert set(arms) == {"control:joint", "control:sequential", "merged"}
    [line] = lineups(load_recipe(calibrated), done)
    [items] = line.inputs.base.calibration_items
    assert {entry.rows for entry in results.evaluations}.isdisjoint({items.sha256[:12]})
    for model in arms.values():
        [found] = model.calibration or ()
        assert (found.reached, found.bound, found.n) == (True, None, len(items.table))
        assert found.share >= 0.9
        assert found.share == pytest.approx(found.base / found.value)
        assert model.scale == found.scale
        tried = json.loads((done / "calibration" / f"{model.stage.replace(':', '-')}.json").read_text())["tried"]
        above = [scale for scale in map(float, tried) if scale > found.scale]
        assert all(found.base / tried[repr(scale)] < 0.9 for scale in above)
    assert len({model.scale for model in arms.values()}) > 1
    assert {row.n for row in results.rows if row.subject == "retain"} == {12 - len(items.table)}
    text = report_text(results)
    assert "each model has the largest scale" in text
    assert "joint control: scale" in text


def test_the_judged_models_are_the_base_and_their_deltas_at_that_scale(calibrated: dict[str, Any], done: Path) -> None:
    [line] = lineups(load_recipe(calibrated), done)
    base = load_base(line.inputs.base.folder, line.inputs.recipe.model)
    before = base.parameters[NAME].detach().clone()
    joint = next(model for model in line.models if model.name == "control:joint")
    scale = json.loads((done / "calibration" / "control-joint.json").read_text())["scale"]
    with joint.laid_over(base):
        wanted = before + scale * open_delta(done / "controls" / "joint").dense(NAME)
        torch.testing.assert_close(base.parameters[NAME].detach(), wanted)
    assert torch.equal(base.parameters[NAME], before)
    scale = json.loads((done / "calibration" / "merged.json").read_text())["scale"]
    plain = spunge.run(
        load_recipe(calibrated, ["calibrate=null", f"merge.scale={scale}", "controls=[]"]), done.parent / "plain"
    )
    merged, theirs = Checkpoint(done / "merged"), Checkpoint(plain.folder / "merged")
    assert all(torch.equal(merged.read(name), theirs.read(name)) for name in theirs.tensors)
    checked = verify(done)
    assert (checked.problems, checked.tensors) == ([], len(theirs.tensors))
    assert {stage.state for stage in status(done)} == {"done"}


def test_another_share_trains_nothing_and_judges_the_base_no_more(calibrated: dict[str, Any], done: Path) -> None:
    told = Told()
    spunge.run(load_recipe(calibrated, ["calibrate.keep=0.8"]), done, told)
    assert not any(line.startswith(("unlearn", "judge base", "judge branch", "measure")) for line in told.lines)
    assert {line for line in told.lines if line.startswith("calibrate ")} == {
        "calibrate control:joint",
        "calibrate control:sequential",
        "calibrate merged",
    }
    again = Told()
    spunge.run(load_recipe(calibrated, ["calibrate.keep=0.8"]), done, again)
    assert not any(line.startswith(("calibrate", "merge", "judge")) for line in again.lines)


def test_a_calibration_that_was_killed_tries_no_scale_again(
    calibrated: dict[str, Any], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (done / "calibration" / "merged.json").read_text()
    (done / "stamps" / "calibrate" / "merged.json").unlink()

    class Killed(Told):
        def step(self, count: int, total: int, note: str = "") -> None:
            if self.lines[-1] == "calibrate merged" and count == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spunge.run(load_recipe(calibrated), done, Killed())
    assert len(json.loads((done / "calibration" / "merged" / "tried.json").read_text())["tried"]) == 2
    steps: list[int] = []
    monkeypatch.setattr(
        Told, "step", lambda self, count, total, note="": steps.append(count) if "scale" in note else None
    )
    spunge.run(load_recipe(calibrated), done, Told())
    assert steps[0] == 3
    assert (done / "calibration" / "merged.json").read_text() == wanted
    assert not (done / "calibration" / "merged").exists()


def test_where_the_disk_has_no_room_to_merge_once_each_try_merges_anew(
    calibrated: dict[str, Any], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lineups(load_recipe(calibrated), done)
    [merged] = [model for model in lines[0].models if model.name == "merged"]
    calibration = _calibration(lines[0], merged, done / "calibration" / "merged.json")
    assert calibration is not None
    deltas = [open_delta(training.folder) for training in merged.trainings]
    shapes = {name: delta.dense(name).shape for delta in deltas for name in delta.tensors}
    entries = sum(map(math.prod, shapes.values()))
    monkeypatch.setattr("spunge.run.calibrate.free_space", lambda folder: 4 * entries)
    once = _scaled(calibration)(0.5)
    assert (once.merge, [each.name for each in once.trainings]) == (None, ["merged"])
    monkeypatch.setattr("spunge.run.calibrate.free_space", lambda folder: 4 * entries - 1)
    anew = _scaled(calibration)(0.5)
    assert (anew.merge, anew.trainings) == (merged.merge.model_copy(update={"scale": 0.5}), merged.trainings)
    assert not (calibration.work / "merged").exists()


@pytest.mark.parametrize(("edit", "bound"), [("calibrate.max_scale=1e-4", "high"), ("calibrate.keep=1", "low")])
def test_a_point_out_of_reach_is_told_flagged_and_judged_at_the_bound(
    calibrated: dict[str, Any], done: Path, edit: str, bound: str
) -> None:
    told = Told()
    overrides = [edit, "controls=[]", "calibrate.tries=3"]
    results = spunge.run(load_recipe(calibrated, overrides), done, told)
    said = told.lines[told.lines.index("calibrate merged") + 1]
    assert "the point is not reached" in said
    [found] = results.models[-1].calibration or ()
    assert (found.reached, found.bound) == (False, bound)
    assert "the point is not reached" in report_text(results)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("calibrate.evaluation=perplexty", "calibrate.evaluation: no evaluation is called 'perplexty'; did you mean"),
        (
            "calibrate.metric=perplexty",
            "calibrate.metric: the evaluation 'perplexity' measures no 'perplexty'; did you",
        ),
        ("calibrate.subject=retian", "calibrate.subject: 'perplexity' has no 'retian'; did you mean 'retain'"),
        ("calibrate.keep=1.5", "calibrate.keep: 1.5"),
        ("merge.scale=2", "merge.scale: 2.0: calibrate sets it"),
        ("merge={rule: slerp}", "merge.rule: 'slerp' has no scale"),
        ("evaluate.0.limit=1", "calibrate.evaluation: 'perplexity' has 1 item of 'retain', all in one half"),
        (
            "evaluate.0={kind: perplexity, text: text, source: SOURCE}",
            "calibrate.subject: missing, .* several: europe, asia",
        ),
        (
            "evaluate.0={kind: perplexity, text: text, source: SOURCE, subject: asia, by: 'NULL'}",
            "'asia' of 'perplexity' is to be forgotten",
        ),
    ],
)
def test_a_calibration_that_cannot_be_is_one_line_before_any_training(
    calibrated: dict[str, Any], tmp_path: Path, edit: str, message: str
) -> None:
    told = Told()
    edit = edit.replace("SOURCE", calibrated["forget"]["source"])
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.run(load_recipe(calibrated, [edit]), tmp_path / "new", told)
    assert "\n" not in str(raised.value)
    assert not any(line.startswith("unlearn") for line in told.lines)


@pytest.fixture
def by_mean(calibrated: dict[str, Any]) -> dict[str, Any]:
    """Calibrated by a harmonic mean over two evaluations of what is kept."""
    kept = {"kind": "memorization", "source": calibrated["retain"]["source"], "by": "NULL", "group": "keep"}
    calibrated["evaluate"] = [
        {**kept, "name": "one", "subject": "one", "metrics": ["probability"]},
        {**kept, "name": "two", "subject": "two", "metrics": ["probability"], "where": "length(text) % 2 = 0"},
    ]
    terms = [{"evaluation": name, "metric": "answer probability"} for name in ("one", "two")]
    utility = {"kind": "harmonic_mean", "of": terms}
    calibrate = {"aggregate": "utility", "keep": 0.9, "tries": 4}
    return calibrated | {"aggregates": {"utility": utility}, "calibrate": calibrate, "controls": ["joint"]}


def test_a_harmonic_mean_keeps_its_share_on_half_of_the_items_of_each_of_its_evaluations(
    by_mean: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(by_mean)
    results = spunge.run(recipe, tmp_path / "run")
    [line] = lineups(recipe, tmp_path / "run")
    halves = {items.name: items for items in line.inputs.base.calibration_items}
    judged = {items.name: items for items in line.inputs.base.evaluations}
    assert halves.keys() == judged.keys() == {"one", "two"}
    for name, half in halves.items():
        texts = [set(items.table["text"].to_pylist()) for items in (half, judged[name])]
        assert texts[0].isdisjoint(texts[1])
    # The base's own, computed apart.
    base, bench = load_base(Path(recipe.model.path), recipe.model), Bench("base", "base", tmp_path, tmp_path)
    measures = {name: MEMORIZATION.measure(base, items.settings, items.table, bench) for name, items in halves.items()}
    shares = [
        float(each.numerator.sum() / each.denominator.sum()) for name in ("one", "two") for each in measures[name]
    ]
    for model in results.models:
        if model.kind not in ("merged", "control"):
            assert model.calibration is None
            continue
        [told] = model.calibration or ()
        assert (told.evaluation, told.metric, told.subject) == ("utility", "utility", "all")
        assert told.base == pytest.approx(stats.hmean(shares), rel=1e-5)
        assert told.share == pytest.approx(told.value / told.base)
        assert told.n == sum(items.table.num_rows for items in halves.values())
        assert (told.share >= 0.9) == (told.reached or told.bound == "high")
    assert "utility" in report_text(results)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("calibrate.aggregate=utilty", "calibrate.aggregate: no aggregate is called 'utilty'; did you mean 'utility'"),
        ("calibrate.metric=answer probability", "calibrate: metric: the aggregate 'utility' says of what it is"),
        ("calibrate={keep: 0.9}", "calibrate: evaluation: missing; give evaluation and metric, or aggregate"),
        (
            "aggregates.utility={kind: ks, of: {evaluation: one, metric: answer probability}, against: 'model:other'}",
            r"calibrate.aggregate: 'utility' \(ks\) is no share of what must be kept",
        ),
        ("evaluate.1.source=FORGET", "calibrate.aggregate: 'two' of 'two' is to be forgotten"),
        (
            "evaluate.0={kind: lm_eval, name: one, tasks: [piqa]}",
            "calibrate.evaluation: 'one' .* brings items of its own",
        ),
    ],
)
def test_a_mean_that_cannot_be_calibrated_by_is_one_line_before_any_training(
    by_mean: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path], edit: str, message: str
) -> None:
    told = Told()
    by_mean["judge"] = [{"name": "other", "path": str(tiny("llama"))}]
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.run(load_recipe(by_mean, [edit.replace("FORGET", by_mean["forget"]["source"])]), tmp_path / "new", told)
    assert "\n" not in str(raised.value)
    assert not any(line.startswith("unlearn") for line in told.lines)


def test_a_plan_tells_of_the_calibrations(calibrated: dict[str, Any], tmp_path: Path) -> None:
    graph = build(load_recipe(calibrated), tmp_path / "new").graph
    names = [name for name in graph.stages if name.startswith("calibrate:")]
    assert names == ["calibrate:base", "calibrate:control:joint", "calibrate:control:sequential", "calibrate:merged"]
    assert list(graph.stages).index("calibrate:base") < list(graph.stages).index("branch:asia")
    planned = spunge.plan(load_recipe(calibrated), tmp_path / "new")
    assert {"calibrate:base", "calibrate:merged"} <= {stage.stage for stage in planned.stages}


@pytest.mark.thorough
def test_several_seeds_have_a_scale_each(calibrated: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    results = spunge.run(
        load_recipe(calibrated, ["seeds=2", "controls=[]", "calibrate.tries=2", "split.values=[asia]"]),
        tmp_path / "new",
    )
    assert len(results.models[-1].calibration or ()) == 2
    assert verify(tmp_path / "new").problems == []
