"""The command driven as a process: what it prints where, and how it exits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


def spunge(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spunge.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def recipe_file(toy_recipe: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text("# A toy.\n" + yaml.safe_dump(toy_recipe))
    return file


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['spunge', '--help']\nfrom spunge.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'pydantic', 'datasets', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "plan", "split", "report", "compare", "list", "init", "env"):
        assert f"\n  {command}" in done.stdout


def test_run_prints_the_table_on_stdout_and_progress_on_stderr(recipe_file: Path, tmp_path: Path) -> None:
    done = spunge("run", str(recipe_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "europe" in done.stdout
    assert "report: " + os.path.join("runs", "toy", "report.html") in done.stdout
    assert "unlearn branch:europe" in done.stderr
    assert "unlearn" not in done.stdout
    assert (tmp_path / "runs" / "toy" / "report.html").exists()
    again = spunge("run", str(recipe_file), "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == json.loads((tmp_path / "runs" / "toy" / "results.json").read_text())
    plan = json.loads(spunge("plan", str(recipe_file), "--json", cwd=tmp_path).stdout)
    assert all(stage["done"] for stage in plan["stages"])
    changed = json.loads(spunge("plan", str(recipe_file), "--set", "merge.scale=2", "--json", cwd=tmp_path).stdout)
    assert [stage["stage"] for stage in changed["stages"] if not stage["done"]] == ["merged", "merged"]


def test_report_and_compare_show_finished_runs(recipe_file: Path, tmp_path: Path) -> None:
    figure = "published=[{stage: merged, subject: asia, metric: accuracy, value: 0.125, source: A paper}]"
    for name, more in (("one", ["--set", figure]), ("two", ["--set", "merge.scale=2"])):
        assert spunge("run", str(recipe_file), *more, "--out", name, cwd=tmp_path).returncode == 0
    page = tmp_path / "one" / "report.html"
    page.unlink()
    done = spunge("report", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert page.exists()
    for said in (
        "control:joint",
        "Parts to forget",
        "Beside the paper",
        "0.125",
        "A paper",
        "Spillover",
        "report: one",
    ):
        assert said in done.stdout
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert json.loads(spunge("report", "one", "--json", cwd=tmp_path).stdout) == results
    done = spunge("compare", "one", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["metric", "subject", "one", "two"]
    found = json.loads(spunge("compare", "one", "two", "--stage", "control:joint", "--json", cwd=tmp_path).stdout)
    assert {row["subject"] for row in found["rows"]} == {"asia", "europe", "retain"}
    for row in found["rows"]:
        assert row["scores"][0] == row["scores"][1]
    results["evaluations"][0]["instrument"] = {"scorer": "another"}
    (tmp_path / "one" / "results.json").write_text(json.dumps(results))
    done = spunge("compare", "one", "two", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "measured with different instruments: (scorer: another) in 'one', none in 'two'" in done.stderr


def test_plan_says_what_is_to_do_and_writes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    done = spunge("plan", str(recipe_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "to do  branch:asia" in done.stdout
    assert "GiB of memory" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_plan_of_a_hub_model_downloads_nothing(recipe_file: Path, tmp_path: Path) -> None:
    done = spunge("plan", str(recipe_file), "--set", "model.path=org/some-model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unknown until the model is downloaded" in done.stdout


def test_split_shows_sizes_and_what_was_dropped(recipe_file: Path) -> None:
    done = spunge("split", str(recipe_file), "--set", "split.values=[asia]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["asia", "12", "0", "12", "asia"]
    assert "dropped europe: 12 rows, not in split.values" in done.stdout
    content = json.loads(spunge("split", str(recipe_file), "--json").stdout)
    assert {part["value"]: part["rows"] for part in content["parts"]} == {"asia": 12, "europe": 12}


def test_list_prints_every_method_rule_evaluator_and_recipe() -> None:
    from spunge.registry import EVALUATORS, METHODS, RULES

    found = json.loads(spunge("list", "--json").stdout)
    assert [entry["name"] for entry in found["methods"]] == METHODS.names()
    assert [entry["name"] for entry in found["rules"]] == RULES.names()
    assert [entry["name"] for entry in found["evaluators"]] == EVALUATORS.names()
    assert "demo" in [entry["name"] for entry in found["recipes"]]
    assert all(entry["summary"] for kind in found.values() for entry in kind)
    text = spunge("list", "methods").stdout
    assert "rmu" in text
    assert "arXiv 2403.03218" in text
    assert "RULES" not in text


def test_init_copies_a_recipe_that_runs_where_it_lands(tmp_path: Path) -> None:
    assert spunge("init", "demo", cwd=tmp_path).returncode == 0
    done = spunge("split", "demo.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Europe" in done.stdout
    again = spunge("init", "demo", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    forbidden = spunge("init", "demo", "--to", "/proc/here")
    assert forbidden.returncode == 2
    assert forbidden.stderr.startswith("spunge: --to: cannot write '/proc/here/demo' (")


def test_env_names_versions_and_devices() -> None:
    found = json.loads(spunge("env", "--json").stdout)
    assert {"python", "torch", "transformers", "spunge", "cpus", "gpus"} <= found.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["run", "RECIPE", "--set", "unlearn.stesp=3"], "unlearn.stesp: no such setting; did you mean 'steps'?"),
        (["run", "RECIPE", "--set", "unlearn.layer=40"], "unlearn.layer: 40: the model has 4 blocks"),
        (["run", "RECIPE", "--set", "model.path=./nowhere"], "model.path: no folder"),
        (
            ["run", "RECIPE", "--set", "evaluate.0.question=qestion"],
            "evaluate.0.question: no column 'qestion'; did you mean 'question'?",
        ),
        (["run", "RECIPE", "--set", "retain=null"], "retain: missing"),
        (["run", "RECIPE", "--set", "unlearn.learning_rate=1e20"], "unlearn.learning_rate"),
        (["split", "RECIPE", "--set", "forget.where=nope > 1"], "forget.where: 'nope > 1'"),
        (["list", "methodes"], "did you mean 'methods'?"),
        (["init", "dmeo"], "did you mean 'demo'?"),
        (["report", "nowhere"], "'nowhere' holds no results.json"),
        (["compare", "nowhere"], "give two or more run folders"),
        (["compare", "nowhere", "elsewhere"], "'nowhere' holds no results.json"),
        (["rnu"], "rnu"),
        (["run", "RECIPE", "--ste", "a=b"], "--ste"),
    ],
)
def test_a_wrong_call_exits_2_with_one_line_and_no_traceback(
    recipe_file: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = spunge(*[str(recipe_file) if word == "RECIPE" else word for word in arguments], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [error] = [line for line in done.stderr.splitlines() if line.startswith("spunge: ")]
    assert said in error
    # Not even what libraries print at exit, such as nanobind's list of what the garbage collector did not reach.
    assert done.stderr.splitlines()[-1] == error
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_recipe_or_of_something_else_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    done = spunge("run", str(recipe_file), "--out", "thesis", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no run's folder" in done.stderr
    fast = ["--set", "unlearn.steps=1", "--set", "evaluate=[]", "--set", "controls=[]"]
    assert spunge("run", str(recipe_file), *fast, cwd=tmp_path).returncode == 0
    done = spunge("run", str(recipe_file), "--set", "split.by=upper(topic)", *fast, cwd=tmp_path)
    assert done.returncode == 2
    assert "made by another recipe (split.by there: 'topic', here: 'upper(topic)')" in done.stderr


def test_an_unwritable_folder_is_named(recipe_file: Path) -> None:
    done = spunge("run", str(recipe_file), "--out", "/proc/spunge-run")
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_named(recipe_file: Path, tmp_path: Path) -> None:
    """Writing a delta fails as safetensors fails on a disk without room (its message read off a full tmpfs)."""
    program = (
        "import sys; from safetensors import SafetensorError; import spunge.weights.writing\n"
        "def full(*_, **__): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')\n"
        "spunge.weights.writing.save_file = full\n"
        "from spunge.cli import main; sys.argv = ['spunge', 'run', sys.argv[1], '--out', sys.argv[2]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe_file), str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "is full" in done.stderr
    assert "Traceback" not in done.stderr
