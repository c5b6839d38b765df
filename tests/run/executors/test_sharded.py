"""Several processes train each model of a run together: the same run, and what happens where one is killed or all are stopped."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.run.executors.sharded import SINCE, ShardedSettings, seats
from started import STEPS_HELD, Command, content, steps, until

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < SINCE,
    reason=f"sharded training needs torch {SINCE[0]}.{SINCE[1]}",
)

FEW = "unlearn.steps=20"  # each takes several times what one takes in one process
TWO = ("execution.kind=sharded", "execution.processes=2")


@pytest.mark.parametrize(
    ("execution", "model", "gpus", "wanted"),
    [
        ({"processes": 3}, {}, 0, ["cpu"] * 3),
        ({}, {}, 0, "execution.processes: auto: there is no GPU"),
        ({}, {}, 4, ["0", "1", "2", "3"]),
        ({"processes": 2}, {}, 4, ["0", "1"]),
        ({"processes": 3}, {}, 2, "execution.processes: 3: .* there are 2"),
        ({}, {}, 1, "execution.processes: auto: .* there are 1"),
        ({"processes": 2}, {"device": "cuda:1"}, 4, "model.device: cuda:1"),
        ({"processes": 2}, {"device": "mps"}, 0, "model.device: mps"),
        ({"processes": 2}, {"train_in": "4bit"}, 2, "model.train_in: 4bit: packed weights cannot be shared out"),
    ],
)
def test_each_process_has_a_gpu_of_its_own_or_they_share_the_cpu(
    execution: dict[str, Any],
    model: dict[str, Any],
    gpus: int,
    wanted: list[str] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings, of = ShardedSettings(**execution), ModelSettings(path="x", **model)
    if isinstance(wanted, str):
        with pytest.raises(RecipeError, match=f"^{wanted}"):
            seats(settings, of)
        return
    assert [slot.environment.get("CUDA_VISIBLE_DEVICES", slot.told) for slot in seats(settings, of)] == wanted


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(RecipeError, match=r"^execution.kind: sharded: needs torch 2.13 or later .*2.11.0\+cpu"):
        seats(ShardedSettings(processes=2), ModelSettings(path="x"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"unlearn": {"method": "rmu", "layer": 2, "steps": 1}},
            "unlearn.method: rmu does not train in several processes",
        ),
        (
            {
                "unlearn": {"method": "npo", "steps": 1},
                "watch": {"evaluation": "perplexity", "metric": "perplexity", "every": 1},
            },
            "watch: a model that several",
        ),
        (
            {"unlearn": {"method": "ga", "steps": 1, "stop": {"accuracy": 0.5, "extraction": 0.5}}},
            "unlearn.stop: a model that several",
        ),
        ({"unlearn": {"method": "altpo", "steps": 1}}, "forget.refusal: missing, and a model that several"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_before_anything_is_made(
    toy_recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    toy_recipe |= change
    with pytest.raises(RecipeError, match=f"^{line}"):
        spunge.run(load_recipe(toy_recipe, TWO), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.json"))


@pytest.fixture(scope="module")
def alike(long: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A recipe's file, the folder of an undisturbed run of it by two processes together, and of one by this process."""
    recipe, folder = long[0], tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUNGE_CACHE", str(folder / "cache"))
        spunge.run(load_recipe(recipe, [FEW]), folder / "here" / "run")
        assert Command(recipe, folder / "two" / "run", *TWO, FEW).ended()[0] == 0
    return recipe, folder / "two" / "run", folder / "here" / "run"


@pytest.mark.thorough
def test_a_run_by_two_processes_together_has_the_files_and_scores_of_one_by_this_process(
    alike: tuple[Path, Path, Path],
) -> None:
    _, several, here = alike
    assert content(several).keys() == content(here).keys()
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (several, here)]
    assert len(rows[0]) > 3
    assert [row["value"] for row in rows[0]] == pytest.approx([row["value"] for row in rows[1]], rel=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGKILL)])
def test_a_process_that_is_gone_ends_the_training_in_one_line_and_the_next_command_goes_on(
    alike: tuple[Path, Path, Path], tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    recipe, undisturbed, _ = alike
    run, held = tmp_path / "run", tmp_path / "held"
    held.touch()
    command = Command(recipe, run, *TWO, FEW, held=held)
    until(lambda: steps(run, "asia") == STEPS_HELD)
    os.kill(sorted(command.children())[rank], number)
    held.unlink()
    code, errors = command.ended()
    assert code == 1
    assert re.search(
        r"unlearn branch:asia: its process on cpu was (killed|told to stop).*; the same command goes on", errors
    )
    assert "Traceback" not in errors
    assert Command(recipe, run, *TWO, FEW).ended()[0] == 0
    assert content(run) == content(undisturbed)


@pytest.mark.thorough
def test_ctrl_c_stops_all_processes_in_order_and_the_next_command_goes_on_from_there(
    alike: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    recipe, undisturbed, _ = alike
    run = tmp_path / "run"
    (tmp_path / "held").touch()
    command = Command(recipe, run, *TWO, FEW, held=tmp_path / "held")
    until(lambda: steps(run, "asia") == STEPS_HELD)
    os.kill(command.process.pid, signal.SIGINT)
    code, _ = command.ended()
    assert code == 130
    assert len(list((run / "branches" / "asia").glob(f"state-*.{STEPS_HELD}-[01].pt"))) == 2
    again = Command(recipe, run, "execution.kind=here", FEW)
    assert "was begun by 2 processes" in again.ended()[1]
    assert Command(recipe, run, *TWO, FEW).ended()[0] == 0
    assert content(run) == content(undisturbed)
