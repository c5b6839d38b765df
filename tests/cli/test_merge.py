"""`spunge merge`: what it prints, and how it exits."""

import json
from pathlib import Path

import pytest

from commands import call
from making import delta_source, noise, weights, write_checkpoint


@pytest.fixture
def merge(tmp_path: Path) -> list[str]:
    base = write_checkpoint(tmp_path / "base", weights())
    for i in range(2):
        delta_source(tmp_path / f"d{i}", base, {"a.weight": noise(i, 24, 32, size=0.01)})
    models = [word for i in range(2) for word in ("--model", str(tmp_path / f"d{i}"))]
    return ["merge", "--base", str(base), *models, "--out", str(tmp_path / "out")]


def test_the_command_merges_and_prints_a_summary(merge: list[str]) -> None:
    merge += ["--density", "0.5", "--set", "tie=majority"]
    ended = call(*merge)
    assert ended.returncode == 0, ended.stderr
    assert "1 tensors merged by ties from 2 models" in ended.stdout
    assert "cosine" in ended.stdout
    assert json.loads(call(*merge, "--json").stdout)["report"]["settings"]["tie"] == "majority"


def test_an_error_is_one_line_and_exits_2(merge: list[str], tmp_path: Path) -> None:
    ended = call(*merge, "--rule", "tees")
    assert ended.returncode == 2
    assert "no rule 'tees'; did you mean 'ties'?" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
