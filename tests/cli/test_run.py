"""`spunge run`, `plan`, `split`, `status` and `verify`: what they print where, and how they exit."""

import json
from pathlib import Path

import pytest

from commands import call


def test_plan_says_what_is_to_do_and_writes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    ended = call("plan", str(recipe_file), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "to do  branch:asia" in ended.stdout
    assert "GiB of the memory of cpu" in ended.stdout
    assert not (tmp_path / "runs").exists()


def test_a_plan_of_a_finished_run_has_to_do_what_a_setting_changes(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    def to_do(*more: str) -> list[str]:
        ended = call("plan", str(recipe_file), "--out", "run", "--json", *more, cwd=tmp_path)
        return [stage["stage"] for stage in json.loads(ended.stdout)["stages"] if not stage["done"]]

    assert to_do() == []
    assert to_do("--set", "merge.scale=2") == ["merged", "merged"]


def test_plan_of_a_hub_model_downloads_nothing(recipe_file: Path, tmp_path: Path) -> None:
    ended = call("plan", str(recipe_file), "--set", "model.path=org/some-model", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "unknown until the model is downloaded" in ended.stdout


def test_split_shows_sizes_and_what_was_dropped(recipe_file: Path) -> None:
    ended = call("split", str(recipe_file), "--set", "split.values=[asia]")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[1].split() == ["asia", "12", "0", "12", "asia"]
    assert "dropped europe: 12 rows, not in split.values" in ended.stdout
    content = json.loads(call("split", str(recipe_file), "--json").stdout)
    assert {part["value"]: part["rows"] for part in content["parts"]} == {"asia": 12, "europe": 12}


def test_run_with_json_prints_what_results_json_holds(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    ended = call("run", str(recipe_file), "--out", "run", "--json", cwd=tmp_path)
    assert json.loads(ended.stdout) == json.loads((finished / "results.json").read_text())


def test_a_folder_of_another_recipe_or_of_something_else_is_refused(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    ended = call("run", str(recipe_file), "--out", "thesis", cwd=tmp_path)
    assert ended.returncode == 2
    assert "is no run's folder" in ended.stderr
    ended = call("run", str(recipe_file), "--set", "split.by=upper(topic)", "--out", finished.name, cwd=tmp_path)
    assert ended.returncode == 2
    # Of a long folder's name the middle of the line is cut; tests/run/test_damage.py holds the whole of it.
    assert ended.stderr.startswith("spunge: --out: ")
    assert "or --replace to make again what no longer fits" in ended.stderr


def test_an_unwritable_folder_is_named(recipe_file: Path) -> None:
    ended = call("run", str(recipe_file), "--out", "/proc/spunge-run")
    assert ended.returncode == 2
    assert "cannot write" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_full_disk_is_named(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a delta fails as safetensors fails on a disk without room (its message read off a full tmpfs)."""
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("spunge.weights.writing.save_file", full)
    ended = call("run", str(recipe_file), "--out", str(tmp_path / "run"))
    assert ended.returncode == 2, ended.stderr
    assert "is full" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_status_and_verify_print_states_and_exit_1_for_damage(finished: Path, tmp_path: Path) -> None:
    ended = call("verify", str(finished))
    assert (ended.returncode, "whole" in ended.stdout) == (0, True)
    (finished / "merge.json").write_text("{}")
    ended = call("verify", str(finished))
    assert (ended.returncode, "merge.json" in ended.stdout) == (1, True)
    ended = call("status", str(finished))
    assert (ended.returncode, "damaged" in ended.stdout) == (0, True)
    assert call("verify", str(tmp_path)).returncode == 2
