"""Estimates: costs by hand, what is done, what is not known yet."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from picked import few
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.registry import EXECUTORS
from spunge.run.costs import LETTERS_PER_TOKEN, judging_cost, merging_cost, training_cost
from spunge.run.plan import Plan, plan, plan_text
from spunge.run.planning.devices import CARDS
from spunge.run.planning.dry import Measured, dry_steps
from spunge.run.stages.building import build
from spunge.weights.checkpoint import Checkpoint
from started import TWO, children, until


def begun(recipe: dict[str, Any], folder: Path, *overrides: str) -> Any:
    return build(load_recipe(recipe, overrides), folder)


def test_a_training_is_planned_by_its_own_rows_lengths_and_sizes(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    sizes = "batch_size: 3, retain_batch_size: 2, accumulation: 4, max_lengths: {retain: 9}"
    told = f"unlearn={{method: graddiff, steps: 5, epochs: null, {sizes}}}"
    line = begun(toy_recipe, tmp_path, told, "controls=[]").seeds[0]
    steps = training_cost(line.trainings[0], line).steps
    assert steps is not None
    assert (steps.count, steps.accumulation) == (5, 4)
    assert [call.of for group in steps.groups for call in group] == ["forget", "retain"]
    assert {side: (rows.batch, list(rows.lengths)) for side, rows in steps.rows.items()} == {
        "forget": (3, [256]),
        "retain": (2, [9]),
    }


@pytest.mark.parametrize(
    ("given", "calls", "copies"),
    [
        ("optimizer: {sam: 0.1}", ["forget", "retain", "forget"], 1),
        ("gru: 0.8", ["forget", "retain"], 2),
        ("optimizer: {sam: 0.1, optimizer: sophia}, gru: 0.8", ["forget", "retain", "forget"], 3),
    ],
)
def test_what_changes_the_gradients_is_planned(
    toy_recipe: dict[str, Any], tmp_path: Path, given: str, calls: list[str], copies: int
) -> None:
    told = f"unlearn={{method: graddiff, steps: 5, epochs: null, {given}}}"
    line = begun(toy_recipe, tmp_path, told, "controls=[]").seeds[0]
    steps = training_cost(line.trainings[0], line).steps
    assert steps is not None
    assert [call.of for group in steps.groups for call in group] == calls
    assert steps.further == copies
    assert steps.optimizer == ("sophia" if "sophia" in given else "adamw")


@pytest.mark.parametrize(("method", "copies"), [("tar", 4), ("kga", 1)])
def test_a_method_that_holds_copies_of_what_it_trains_is_planned_with_them(
    toy_recipe: dict[str, Any], tmp_path: Path, method: str, copies: int
) -> None:
    line = begun(toy_recipe, tmp_path, f"unlearn={{method: {method}, steps: 5, epochs: null}}", "controls=[]").seeds[0]
    steps = training_cost(line.trainings[0], line).steps
    assert steps is not None
    assert steps.further == copies


@pytest.mark.parametrize(
    ("given", "rows"),
    [("kga, copies: {epochs: 2}, new_share: 0.5", 3), ("whp, reinforce: {epochs: 2}", 2), ("npo", 0)],
)
def test_copies_that_are_trained_first_are_planned_by_their_own_steps(
    toy_recipe: dict[str, Any], tmp_path: Path, given: str, rows: int
) -> None:
    told = f"unlearn={{method: {given}, steps: 5, epochs: null, batch_size: 2}}"
    line = begun(toy_recipe, tmp_path, told, "controls=[]").seeds[0]
    cost = training_cost(line.trainings[0], line)
    forget, retain = len(line.trainings[0].parts[0].samples), len(line.inputs.retain)
    passes = {0: [], 2: [forget], 3: [forget, round(retain / 2)]}[rows]
    assert cost.steps is not None
    assert cost.steps.count == 5
    assert (cost.copying.count if cost.copying else 0) == sum(-(-2 * each // 2) for each in passes)


@pytest.mark.parametrize(
    ("given", "texts", "tokens", "again"),
    [
        ("method: elm, written_tokens: 7, steps: 5", 1, 7, 2),
        ("method: elm, fluency: 0, steps: 5", 0, 0, 0),
        ("method: altpo, alternatives: {count: 3, tokens: 11}, epochs: 2", 2, 11, 0),  # of two passes, two answers
        ("method: npo, steps: 5", 0, 0, 0),
    ],
)
def test_what_the_base_writes_before_a_training_is_planned(
    toy_recipe: dict[str, Any], tmp_path: Path, given: str, texts: int, tokens: int, again: int
) -> None:
    line = begun(toy_recipe, tmp_path, f"unlearn={{{given}}}", "controls=[]").seeds[0]
    cost, rows = training_cost(line.trainings[0], line), len(line.trainings[0].parts[0].samples)
    [first] = cost.first
    assert (first.texts, first.tokens, first.again) == (texts * rows, tokens, again)


def test_the_joint_control_takes_the_steps_that_the_branches_take_together(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    line = begun(toy_recipe, tmp_path).seeds[0]
    counts = {each.name: steps.count for each in line.trainings if (steps := training_cost(each, line).steps)}
    assert counts["control:joint"] == counts["branch:asia"] + counts["branch:europe"]


def test_a_merge_reads_the_base_and_every_delta(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    line = begun(toy_recipe, tmp_path).seeds[0]
    checkpoint = Checkpoint(Path(toy_recipe["model"]["path"]))
    projections = 3 * 32 * 48  # the down projections of three blocks
    assert merging_cost(line).nbytes == checkpoint.nbytes + 8 * projections * 2


def test_judging_counts_letters_and_the_tokens_that_are_written(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["evaluate"] = [
        {
            "kind": "toxicity",
            "prompt": "text",
            "scorer": "alt-profanity-check",
            "generation": {"max_new_tokens": 7},
            "limit": 4,
        }
    ]
    [judging, *_] = begun(toy_recipe, tmp_path).judgings[0]
    cost = judging_cost(judging)
    assert cost.tokens == judging.items.table.nbytes / LETTERS_PER_TOKEN
    assert cost.written == 4 * 7


@pytest.mark.thorough
def test_a_plan_lists_every_stage_and_what_of_it_is_done(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = spunge.plan(load_recipe(toy_recipe), tmp_path / "run")
    assert not any(stage.done for stage in planned.stages)
    assert planned.seconds == pytest.approx(sum(stage.seconds or 0 for stage in planned.stages), abs=0.11)
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    after = spunge.plan(load_recipe(toy_recipe, ["merge.scale=2"]), tmp_path / "run")
    assert [stage.stage for stage in after.stages if not stage.done] == [
        "merged",
        "merged",
    ]  # the merge, and judging it
    assert "to do  merged" in plan_text(after)


@pytest.mark.thorough
@pytest.mark.parametrize(("edit", "refused"), [("unlearn.steps=5", True), ("merge.scale=2", False)])
def test_a_plan_says_when_a_run_would_ask_for_replace(
    toy_recipe: dict[str, Any], tmp_path: Path, edit: str, refused: bool
) -> None:
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    edited = load_recipe(toy_recipe, [edit])
    notes = [note for note in spunge.plan(edited, tmp_path / "run").notes if "--replace" in note]
    assert bool(notes) == refused
    if refused:
        with pytest.raises(RecipeError, match="--replace") as raised:
            spunge.run(edited, tmp_path / "run")
        assert notes[0].partition("(")[2].partition(";")[0] in str(raised.value)


def test_stages_of_different_seeds_have_different_titles(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    titles = [stage.title for stage in begun({**toy_recipe, "seeds": 3}, tmp_path).graph.stages.values()]
    assert len(set(titles)) == len(titles)


def test_a_plan_writes_nothing_and_downloads_nothing(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = spunge.plan(load_recipe(toy_recipe, ["model.path=nobody/nothing"]), tmp_path / "run")
    assert (planned.memory, planned.disk, planned.seconds) == (None, None, None)
    assert "unknown until the model is downloaded (hf download OWNER/NAME)" in plan_text(planned)
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_what_a_run_refuses(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="topics"):
        spunge.plan(load_recipe(toy_recipe, ["split.by=topics"]), tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run's folder"):
        spunge.plan(load_recipe(toy_recipe), tmp_path / "notes")


@pytest.mark.parametrize(("dtype", "width"), few([("base", 2), ("float32", 4), ("float16", 2)], 1))
def test_the_disk_is_that_of_the_dtype_which_is_written(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path, dtype: str, width: int
) -> None:
    folder = tiny("llama", dtype=torch.bfloat16)
    toy_recipe["model"] = {"path": str(folder)}
    planned = spunge.plan(load_recipe(toy_recipe, [f"merge.dtype={dtype}", "controls=[]"]), tmp_path / "run")
    entries = sum(info.numel for info in Checkpoint(folder).tensors.values())
    projections = 3 * 32 * 48
    assert planned.disk == width * entries + 2 * 4 * projections


def test_a_plan_says_which_stages_are_made_at_once_and_how_long_that_takes(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    toy_recipe["unlearn"]["steps"] = 10_000
    alone, two = (spunge.plan(load_recipe(toy_recipe, overrides), tmp_path / "run") for overrides in ((), TWO))
    assert (alone.at_once, two.at_once) == (1, 2)
    assert alone.first == ["branch:asia"]
    assert two.first == ["branch:asia", "branch:europe"]
    assert alone.elapsed == pytest.approx(alone.seconds, abs=0.5)
    assert alone.elapsed is not None
    assert two.elapsed is not None
    assert alone.elapsed / 2 <= two.elapsed < 0.9 * alone.elapsed
    assert "stages at once" not in plan_text(alone)
    assert re.search(
        r"up to 2 stages at once, each with memory of its own, about [\d.]+ GiB together: about ", plan_text(two)
    )
    # Judging is what both hold in the end: one makes it, the other helps.
    judging = max(step.memory or 0 for step in two.stages if step.work.startswith("judge"))
    assert alone.together is None
    assert two.memory is not None
    assert two.together is not None
    assert 2 * judging <= two.together <= 2 * two.memory
    assert plan_text(two).endswith("; first branch:asia, branch:europe")


def test_more_processes_than_a_device_holds_are_refused_with_how_many_it_holds(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    def planned(count: int) -> Plan:
        overrides = ["execution.kind=processes", f"execution.per_device={count}"]
        return spunge.plan(load_recipe(toy_recipe, overrides), tmp_path / "run")

    (told,) = planned(100_000).refused
    assert told.startswith("execution.per_device: 100000 processes share the ")
    most = re.search(r"give (\d+) at the most", told)
    assert most
    assert not [line for line in planned(int(most[1])).refused if "per_device" in line]


@pytest.mark.parametrize(
    ("execution", "wanted"),
    [
        ({"kind": "processes", "devices": [0, 5]}, (2, 1)),
        ({"kind": "processes", "devices": [0, 1, 2], "per_device": 2}, (6, 1)),
        ({"kind": "processes", "per_device": 3}, (3, 1)),
        ({"kind": "sharded", "processes": 8}, (1, 8)),
        ({"kind": "here"}, (1, 1)),
        ({"kind": "processes", "devices": [1, 1]}, "execution.devices"),
        ({"kind": "sharded"}, "execution.processes"),
    ],
)
def test_for_a_card_by_name_the_devices_are_those_that_are_asked_for(
    toy_recipe: dict[str, Any], tmp_path: Path, execution: dict[str, Any], wanted: tuple[int, int] | str
) -> None:
    unlearn = {"method": "npo", "steps": 1}
    recipe = load_recipe({**toy_recipe, "unlearn": unlearn, "execution": execution})
    executor = EXECUTORS.get(recipe.execution.kind)
    if isinstance(wanted, str):
        with pytest.raises(RecipeError, match=f"^{wanted}"):
            spunge.plan(recipe, tmp_path / "run", device="rtx4090")
        return
    assert executor.planned(recipe, elsewhere=True) == wanted
    assert spunge.plan(recipe, tmp_path / "run", device="rtx4090").at_once == wanted[0]


def test_stages_that_do_not_fit_alike_are_told_in_a_line(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory=10_000_000))
    told = spunge.plan(load_recipe(toy_recipe), tmp_path / "run", device="h100").refused
    assert len(told) == len({line.rpartition(": ")[2].partition("(")[0] for line in told})
    assert any(re.search(r"; \d+ more stages? likewise$", line) for line in told)


def test_what_an_evaluation_measures_with_and_cannot_be_had_is_refused_by_a_plan_too(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    toy_recipe["evaluate"] = [{"kind": "similarity", "prompt": "text", "encoder": str(tmp_path / "none")}]
    for made in (spunge.plan, spunge.run):
        with pytest.raises(RecipeError, match=r"^evaluate\.encoder: "):
            made(load_recipe(toy_recipe), tmp_path / "run")


@pytest.mark.thorough
def test_a_plan_refuses_what_does_not_fit_unless_it_is_asked_for_anyway(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from spunge.cli import app

    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory=10_000_000))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(toy_recipe))
    command = ["plan", str(recipe), "--out", str(tmp_path / "run"), "--device", "h100"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0
    told = CliRunner().invoke(app, [*command, "--anyway"])
    assert told.exit_code == 0
    assert "and h100 has 0.0 GiB" in told.stdout


def test_a_plan_is_scaled_by_steps_that_were_measured(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.run.planning.dry.dry_steps", lambda recipe: Measured(4, 1.5, 1.5, 3 << 30))
    measured = spunge.plan(load_recipe(toy_recipe), tmp_path / "run", measure=True)
    [branch, *_] = [stage for stage in measured.stages if stage.stage == "branch:asia"]
    assert branch.seconds == pytest.approx(toy_recipe["unlearn"]["steps"] * 1.5, rel=0.3)
    assert branch.memory == pytest.approx(3 << 30, rel=0.01)
    assert any(note.startswith("measured: 4 steps of branch:asia: 1.50 s each") for note in measured.notes)


@pytest.mark.thorough
def test_steps_that_are_measured_are_the_methods_own_and_leave_nothing(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    measured = dry_steps(load_recipe(toy_recipe), 3)
    assert measured.steps == 3
    assert measured.seconds > 0
    assert measured.memory > 200 << 20
    with pytest.raises(RecipeError, match=r"^--measure: steps are taken on the device at hand"):
        spunge.plan(load_recipe(toy_recipe), tmp_path / "run", device="h100", measure=True)


@pytest.mark.thorough
def test_steps_that_are_measured_end_with_the_plan_that_asked_for_them(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(toy_recipe))
    program = (
        "from spunge.recipe.loading import load_recipe; from spunge.run.planning.dry import dry_steps; "
        f"dry_steps(load_recipe({str(recipe)!r}), 10_000_000)"
    )
    asking = subprocess.Popen([sys.executable, "-c", program])
    try:
        [taking] = until(lambda: children(asking.pid))
    finally:
        asking.kill()
        asking.wait()
    until(lambda: not Path(f"/proc/{taking}").exists(), 60)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_plan_of_a_configuration_alone_is_the_plan_of_the_model(
    toy_recipe: dict[str, Any], tmp_path: Path, tokenizer: bool
) -> None:
    whole = spunge.plan(load_recipe(toy_recipe), tmp_path / "run")
    model, alone = Path(toy_recipe["model"]["path"]), tmp_path / "alone"
    alone.mkdir()
    for file in model.iterdir():
        if file.name == "config.json" or (tokenizer and not file.name.startswith("model")):
            (alone / file.name).symlink_to(file)
    toy_recipe["model"] = {**toy_recipe["model"], "path": str(alone)}
    planned = spunge.plan(load_recipe(toy_recipe), tmp_path / "run")
    [note] = [note for note in planned.notes if "holds no weights" in note]
    assert str(alone) in note
    assert [stage.stage for stage in planned.stages] == [stage.stage for stage in whole.stages]
    if tokenizer:
        assert [(each.memory, each.disk) for each in planned.stages] == [
            (each.memory, each.disk) for each in whole.stages
        ]
    else:
        assert any("no tokenizer is there" in note for note in planned.notes)
        assert (planned.memory or 0) >= (whole.memory or 1)


@pytest.mark.parametrize("fault", ["a column of images", "a row without a token to learn", "a stage that is none"])
def test_what_a_run_refuses_of_rows_and_items_its_plan_refuses_in_the_same_words(
    toy_recipe: dict[str, Any], seeing: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"topic": "a", "text": "the city is old", "image": "1.png"}\n')
    given = {"source": str(rows)}
    recipe = {**toy_recipe, "unlearn": {"method": "ga", "steps": 1}, "controls": []}
    if fault == "a column of images":
        recipe |= {"model": {"path": str(seeing()), "part": "language"}, "forget": given}
    elif fault == "a row without a token to learn":
        rows.write_text('{"topic": "a", "text": "city"}\n')
        recipe |= {"forget": given}
    else:
        recipe["evaluate"] = [{"kind": "perplexity", **toy_recipe["retain"], "by": "NULL", "stages": ["nowhere"]}]
    told = []
    for refuse in (spunge.run, plan):
        with pytest.raises(RecipeError) as error:
            refuse(load_recipe(recipe), tmp_path / "run")
        told.append(str(error.value))
    assert told[0] == told[1]
