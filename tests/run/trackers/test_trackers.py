"""What each tracker is told, read back by its own package where that is installed, or by what stands for it."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.explanation import validated
from spunge.registry import TRACKERS
from spunge.run.trackers.tracker import Tracked

VALUES = {"loss": 2.5, "grad norm (all)": 0.25}
TOLD = [
    ("branches/europe", VALUES, 1),
    ("branches/asia", {"loss": 3.0}, 1),
    ("scores/merged", {"accuracy/europe": 0.5}, 0),
]


def tell(kind: str, folder: Path, **settings: Any) -> None:
    tracker = TRACKERS.get(kind)
    made = validated(tracker.settings, {"kind": kind, **settings})
    with tracker.log(made, Tracked("run", folder, {"unlearn": {"method": "npo"}})) as log:
        for group, values, step in TOLD:
            log.scalars(group, values, step)


def test_tensorboard_reads_back_what_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "branches/europe/loss": [(1, 2.5)],
        "branches/europe/grad norm _all_": [(1, 0.25)],
        "branches/asia/loss": [(1, 3.0)],
        "scores/merged/accuracy/europe": [(0, 0.5)],
    }
    assert any("recipe" in tag for tag in events.Tags()["tensors"])


def test_mlflow_reads_back_what_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tell("mlflow", tmp_path, experiment="mine")
    client = tracking.MlflowClient(tracking_uri=store)
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["branches/europe/loss"] == 2.5
    assert [each.step for each in client.get_metric_history(run.info.run_id, "branches/asia/loss")] == [1]


def test_mlflow_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI of the environment does not say where"):
        tell("mlflow", tmp_path)


def test_wandb_offline_writes_into_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell("wandb", tmp_path, project="mine")
    [written] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 0


class Stand:
    """What stands for a package's run: it keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.begun: dict[str, Any] = {}
        self.finished = 0

    def init(self, **settings: Any) -> "Stand":
        self.begun = settings
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert step_metric.rpartition("/")[2] == "step"

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.told.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_each_training_has_steps_of_its_own_and_no_key_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stand, module = Stand(), ModuleType(kind)
    module.init = stand.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, module)
    tell(kind, tmp_path, project="mine")
    assert stand.finished == 1
    assert (stand.begun["project"], stand.begun["name"]) == ("mine", "run")
    assert stand.begun["config"] == {"unlearn": {"method": "npo"}}
    assert stand.begun.keys() <= {"project", "name", "config", "dir"}
    values, step = stand.told[0]
    assert values["branches/europe/loss"] == 2.5
    assert (values["branches/europe/step"] if kind == "wandb" else step) == 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_run_that_fails_is_ended_at_the_tracker_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stand, module = Stand(), ModuleType(kind)
    module.init = stand.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, module)
    tracker = TRACKERS.get(kind)
    with pytest.raises(ZeroDivisionError), tracker.log(tracker.settings(), Tracked("run", tmp_path, {})):
        raise ZeroDivisionError
    assert stand.finished == 1
