"""The whole run on tiny models: what it writes, what it takes up again, what it refuses."""

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from picked import few
from spunge.errors import RecipeError
from spunge.files import LOCK
from spunge.progress import Silent
from spunge.recipe.loading import load_recipe
from spunge.results import read_results
from spunge.run.outcome import versions
from spunge.run.stages.building import lineups
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from toys import Told


class Recorder(Silent):
    """A watcher that keeps the titles of what was really done."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def begin(self, title: str) -> None:
        self.titles.append(title)

    def worked(self) -> list[str]:
        return [title for title in self.titles if title.split()[0] in ("unlearn", "merge", "judge")]


def run(recipe: dict[str, Any], out: Path, *overrides: str, replace: bool = False) -> tuple[Any, list[str]]:
    recorder = Recorder()
    results = spunge.run(load_recipe(recipe, overrides), out, recorder, replace)
    return results, recorder.worked()


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["unlearn"]["steps"] = 1
    before = os.umask(0o007)
    try:
        run(toy_recipe, tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(modes) > 20
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != 0o660 and path.name != LOCK} == {}


def test_spunges_version_is_known_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it runs from its source: a run must not fail at its last stage for that."""

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("spunge.run.outcome.version", missing)
    assert versions() == {"python": platform.python_version(), "spunge": spunge.__version__}


def test_a_run_leaves_every_file_that_the_design_names(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    results, _ = run(toy_recipe, out)
    for name in (
        "recipe.yaml",
        "split.json",
        "branches/europe/delta.safetensors",
        "branches/asia/delta.json",
        "branches/asia/log.jsonl",
        "stamps/branch/asia.json",
        "controls/joint/delta.json",
        "merged/model.safetensors",
        "merged/tokenizer.json",
        "merge.json",
        "results.json",
        "report.html",
    ):
        assert (out / name).exists(), name
    content = json.loads((out / "results.json").read_text())
    assert content["schema"] == 1
    assert {row["stage"] for row in content["rows"]} == {
        "base",
        "branch:europe",
        "branch:asia",
        "control:joint",
        "merged",
    }
    assert {(row["subject"], row["metric"]) for row in content["rows"]} == {
        ("europe", "accuracy"),
        ("asia", "accuracy"),
        ("retain", "perplexity"),
    }
    assert all(row["low"] <= row["value"] <= row["high"] for row in content["rows"])
    assert results.value("base", "retain", "perplexity") > 1


def test_merged_loads_in_a_process_that_never_heard_of_spunge(finished: Path) -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m = M.from_pretrained(sys.argv[1], dtype='auto'); t = T.from_pretrained(sys.argv[1]);"
        "print(m(**t('the capital of france', return_tensors='pt')).logits.isfinite().all().item(), 'spunge' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(finished / "merged")], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["True", "False"]


def test_only_the_tensors_that_branches_changed_differ_from_the_base(
    toy_recipe: dict[str, Any], finished: Path
) -> None:
    base, merged = Checkpoint(Path(toy_recipe["model"]["path"])), Checkpoint(finished / "merged")
    different = {name for name in base.tensors if not torch.equal(base.read(name), merged.read(name))}
    assert different == {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1, 2)}


def test_a_second_run_does_nothing_again_and_reports_the_same(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    first, worked = run(toy_recipe, tmp_path / "run")
    assert len(worked) == 3 + 1 + 5 * 2
    second, worked = run(toy_recipe, tmp_path / "run")
    assert worked == []
    assert second.rows == first.rows


def test_the_written_recipe_runs_again_as_it_is(finished: Path, tmp_path: Path) -> None:
    again = spunge.run(finished / "recipe.yaml", tmp_path / "again")
    assert again.rows == read_results(finished).rows
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()


def test_changing_the_merge_trains_nothing(toy_recipe: dict[str, Any], finished: Path) -> None:
    _, worked = run(toy_recipe, finished, "merge.scale=2.0")
    assert worked == ["merge", "judge merged: choices", "judge merged: perplexity"]


def test_changing_an_evaluation_repeats_that_one_alone(toy_recipe: dict[str, Any], finished: Path) -> None:
    _, worked = run(toy_recipe, finished, "evaluate.0.normalize=characters")
    assert len(worked) == 5
    assert all(title.endswith(": choices") for title in worked)


def test_changing_one_part_trains_that_part_and_the_control(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    file = tmp_path / "forget.jsonl"
    lines = Path(toy_recipe["forget"]["source"]).read_text().splitlines()
    file.write_text("\n".join(lines) + "\n")
    toy_recipe["forget"]["source"] = str(file)
    run(toy_recipe, tmp_path / "run")
    file.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(
        RecipeError, match=r"no longer fit \(branch:asia: part asia changed, and 1 more\); give --replace"
    ):
        run(toy_recipe, tmp_path / "run")
    _, worked = run(toy_recipe, tmp_path / "run", replace=True)
    assert [title for title in worked if title.startswith("unlearn")] == [
        "unlearn branch:asia",
        "unlearn control:joint",
    ]


def test_changing_a_methods_setting_trains_every_branch(toy_recipe: dict[str, Any], finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"branch:asia: unlearn\.alpha was 100\.0, is 7\.0, and 2 more"):
        run(toy_recipe, finished, "unlearn.alpha=7")
    _, worked = run(toy_recipe, finished, "unlearn.alpha=7", replace=True)
    assert sum(title.startswith("unlearn") for title in worked) == 3
    assert not any(title.startswith("judge base") for title in worked)


@pytest.mark.thorough
def test_changing_the_base_weights_in_place_starts_over(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(toy_recipe["model"]["path"], folder)
    toy_recipe["model"]["path"] = str(folder)
    run(toy_recipe, tmp_path / "run")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, worked = run(toy_recipe, tmp_path / "run", replace=True)
    assert len(worked) == 3 + 1 + 5 * 2


@pytest.mark.thorough
def test_a_run_that_was_stopped_goes_on_from_the_last_finished_stage(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    class Stopper(Recorder):
        def begin(self, title: str) -> None:
            super().begin(title)
            if title == "unlearn control:joint":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spunge.run(load_recipe(toy_recipe), tmp_path / "stopped", Stopper())
    resumed, worked = run(toy_recipe, tmp_path / "stopped")
    assert worked[0] == "unlearn control:joint"
    assert resumed.rows == read_results(finished).rows


def test_a_branch_cut_off_in_the_middle_is_trained_again(toy_recipe: dict[str, Any], finished: Path) -> None:
    before = open_delta(finished / "branches" / "asia").dense("model.layers.1.mlp.down_proj.weight")
    (finished / "stamps" / "branch" / "asia.json").unlink()
    _, worked = run(toy_recipe, finished)
    assert worked == ["unlearn branch:asia"]
    after = open_delta(finished / "branches" / "asia").dense("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(before, after)


def test_what_a_training_kept_to_go_on_is_gone_once_it_is_done_also_where_the_process_was_killed_in_between(
    toy_recipe: dict[str, Any], finished: Path
) -> None:
    for folder in (finished / "branches" / "asia", finished / "controls" / "joint"):
        (folder / "state-0123456789ab.pt").write_bytes(b"weights")
    spunge.run(toy_recipe, finished)
    assert not list(finished.rglob("state-*"))


def test_each_branch_starts_from_the_base_whatever_ran_before_it(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    run(toy_recipe, tmp_path / "one", "split.values=[asia]", "evaluate=[]")
    names = [folder / "branches" / "asia" for folder in (finished, tmp_path / "one")]
    first, second = (open_delta(name).dense("model.layers.2.mlp.down_proj.weight") for name in names)
    assert torch.equal(first, second)


def test_the_joint_control_takes_the_branches_steps_together(finished: Path) -> None:
    steps = [
        json.loads((finished / place / "delta.json").read_text())["steps"]
        for place in ("branches/europe", "branches/asia", "controls/joint")
    ]
    assert steps == [3, 3, 6]


def test_values_that_are_no_folder_names_stay_inside_the_run(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    from toys import rows

    values = ["a/b", "A/B", "../../x", "<script>alert(1)</script>", "x" * 400, "日本", "con"]
    bad: list[Any] = ["", "  ", None]
    content = [{**row, "topic": value} for value in [*values, *bad] for row in rows(["any"], 2)]
    toy_recipe["forget"]["source"] = str(write_rows("hostile.jsonl", content))
    out = tmp_path / "deep" / "run"
    [line] = lineups(load_recipe(toy_recipe), out)
    assert {part.value for part in line.inputs.parts.parts} == set(values)
    assert line.inputs.parts.unassigned == 6
    folders = [training.folder for training in line.trainings if training.name.startswith("branch:")]
    assert all(folder.parent == out / "branches" for folder in folders)
    assert len({str(folder).lower() for folder in folders}) == len(values)
    results, _ = run(toy_recipe, out, "evaluate=[]", "unlearn.steps=1")
    assert results.folder == out
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert not list(tmp_path.glob("x*"))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["rmu", "tvn"])
def test_prompts_with_completions_and_chats_run_like_plain_text(
    toy_recipe: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path], tokenizer_folder: Path, method: str
) -> None:
    pairs = [{"topic": topic, "ask": "the capital of france is", "reply": " paris"} for topic in ("a", "b")] * 3
    toy_recipe["forget"] = {"source": str(write_rows("pairs.jsonl", pairs)), "prompt": "ask", "completion": "reply"}
    toy_recipe["retain"] = {"source": toy_recipe["retain"]["source"], "text": "text"}
    toy_recipe["unlearn"] = {"method": method, "epochs": 1, "steps": None}
    toy_recipe["evaluate"] = [{"kind": "perplexity"}]
    results, _ = run(toy_recipe, tmp_path / "pairs")
    assert results.value("base", "a", "perplexity") > 1
    chats = [
        {
            "topic": row["topic"],
            "talk": [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": "paris"}],
        }
        for row in pairs
    ]
    toy_recipe["forget"] = {"source": str(write_rows("chats.jsonl", chats)), "messages": "talk"}
    with pytest.raises(spunge.RecipeError, match="no chat template"):
        run(toy_recipe, tmp_path / "chats")
    import shutil

    model = tmp_path / "model"
    shutil.copytree(toy_recipe["model"]["path"], model)
    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}{% if add_generation_prompt %}{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    results, _ = run(toy_recipe, tmp_path / "talks", f"model.path={model}")
    assert results.value("base", "b", "perplexity") > 1
    assert (tmp_path / "talks" / "merged" / "chat_template.jinja").read_text() == template


def test_tied_embeddings_stay_tied_and_dtype_is_the_bases(
    toy_recipe: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny("llama", torch.bfloat16, tie_word_embeddings=True)
    toy_recipe["unlearn"] |= {"method": "tvn", "trainable": {"kind": "all"}}
    del toy_recipe["unlearn"]["layer"]
    run(toy_recipe, tmp_path / "run", f"model.path={base}", "merge.density=1.0")
    merged = Checkpoint(tmp_path / "run" / "merged")
    assert "lm_head.weight" not in merged.tensors
    assert {info.dtype for info in merged.tensors.values()} == {torch.bfloat16}
    assert not torch.equal(merged.read("model.embed_tokens.weight"), Checkpoint(base).read("model.embed_tokens.weight"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("architecture", few(["mistral", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt"], 2, 4))
def test_every_architecture_runs_from_recipe_to_report(
    toy_recipe: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path], architecture: str
) -> None:
    results, _ = run(toy_recipe, tmp_path / "run", f"model.path={tiny(architecture)}", "unlearn.steps=1", "controls=[]")
    assert {row.stage for row in results.rows} == {"base", "branch:europe", "branch:asia", "merged"}
    assert len(json.loads((tmp_path / "run" / "merge.json").read_text())["tensors"]) == 3


def test_the_judged_merged_model_is_the_one_on_disk(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    results, _ = run(toy_recipe, tmp_path / "run", "unlearn.learning_rate=0.1")
    alone = spunge.run(
        load_recipe(toy_recipe, [f"model.path={tmp_path / 'run' / 'merged'}", "unlearn.steps=1", "controls=[]"]),
        tmp_path / "again",
    )
    merged = results.value("merged", "retain", "perplexity")
    assert alone.value("base", "retain", "perplexity") == pytest.approx(merged, rel=1e-6)
    assert merged != pytest.approx(results.value("base", "retain", "perplexity"), rel=1e-3)


def test_the_reported_time_is_of_all_stages_whenever_they_ran(toy_recipe: dict[str, Any], finished: Path) -> None:
    first = read_results(finished)
    again, _ = run(toy_recipe, finished)
    assert again.content["seconds"] == first.content["seconds"] > 0


def test_a_change_that_rounding_swallows_is_an_error_and_no_branch(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    toy_recipe["model"]["path"] = str(tiny("llama", torch.bfloat16))
    toy_recipe["merge"]["rounding"] = "nearest"
    toy_recipe["unlearn"]["learning_rate"] = 1e-12  # the delta's float32 holds it, base + delta in bfloat16 does not
    with pytest.raises(RecipeError, match=r"unlearn\.learning_rate: all that branch:asia changed is lost in rounding"):
        spunge.run(toy_recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "stamps" / "branch" / "asia.json").exists()


def test_two_processes_do_not_work_in_one_folder(toy_recipe: dict[str, Any], finished: Path) -> None:
    results = read_results(finished)
    holding = (
        "import sys, pathlib; from spunge.files import alone\n"
        "with alone(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    )
    command = [sys.executable, "-c", holding, str(finished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RecipeError, match="another process is at work in"):
            run(toy_recipe, finished)
        other.communicate("\n")
    again, worked = run(toy_recipe, finished)
    assert (again.rows, worked) == (results.rows, [])


def test_another_scale_of_a_runs_branches_trains_nothing(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    recipe = load_recipe(toy_recipe, ["merge.scale=2"])
    spunge.run(recipe, alone)
    told = Told()
    spunge.run(recipe, out, told, others=[finished])
    taken = [told.lines[at - 1] for at, line in enumerate(told.lines) if line == f"from {finished.parent.name}/run"]
    assert [line for line in told.lines if line.startswith("unlearn") and line not in taken] == []
    assert any(title.startswith("unlearn") for title in taken)
    assert not any("merged" in title for title in taken)
    assert fingerprints(out) == fingerprints(alone)


def test_what_tells_how_a_run_was_made_is_not_taken_from_another(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    told, out = Told(), tmp_path / "out"
    results = spunge.run(toy_recipe, out, told, others=[finished])
    made = [line for line, after in itertools.pairwise(told.lines) if not after.startswith("from ")]
    assert "results" in made
    assert not any(line.startswith(("unlearn", "judge", "merge")) for line in made)
    assert results.rows == read_results(finished).rows
    assert results.seconds == 0.0, "all stages were the other run's"
    page = (out / "report.html").read_text()
    assert "--out ../out-again" in page
    assert "Stages taken from other runs" in page
    assert "Stages taken from other runs" not in (finished / "report.html").read_text()


def test_branches_that_another_run_trained_otherwise_are_trained(
    toy_recipe: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    told = Told()
    spunge.run(load_recipe(toy_recipe, ["unlearn.steps=1"]), tmp_path / "out", told, others=[finished])
    taken = [told.lines[at - 1] for at, line in enumerate(told.lines) if line.startswith("from ")]
    assert not [title for title in taken if title.startswith("unlearn")]


def test_a_folder_to_take_from_that_is_no_runs_is_refused_before_anything_is_made(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"holds no recipe\.yaml"):
        spunge.run(toy_recipe, tmp_path / "out", others=[tmp_path])
    assert not (tmp_path / "out").exists()


def fingerprints(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*.safetensors"))}
