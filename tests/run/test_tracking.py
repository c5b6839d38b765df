"""`track`: what a tracker is told of a run, and that it changes nothing of the run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import RecipeError
from spunge.files import append_text, write_text
from spunge.progress import SILENT
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.run.stages.building import build
from spunge.run.tracking import Following, tracked

OWN = """
from contextlib import contextmanager
from pathlib import Path
import json
from spunge.recipe.tracking import TrackSettings
from spunge.run.trackers.tracker import Tracker

class File:
    def __init__(self, run): self.run = run
    def scalars(self, group, values, step):
        if (Path(__file__).parent / "broken").exists(): raise OSError("the network is gone")
        with open(Path(__file__).parent / "told.jsonl", "a") as file:
            file.write(json.dumps([group, values, step]) + "\\n")

@contextmanager
def log(settings, run):
    '''A file.'''
    (Path(__file__).parent / "recipe.json").write_text(json.dumps(run.recipe))
    if (Path(__file__).parent / "closed").exists(): raise OSError("no such server")
    yield File(run)

OWN = Tracker(TrackSettings, "a test", "json", "own", log)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A tracker of the user's own; what it is told stands beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    return folder


def told(own: Path) -> list[Any]:
    file = own / "told.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_run_tells_its_losses_and_scores_and_its_files_are_as_without(
    finished: Path, toy_recipe: dict[str, Any], own: Path
) -> None:
    branch = finished / "branches" / "europe"
    before = {file: file.read_bytes() for file in finished.rglob("*.safetensors")}
    results = (finished / "results.json").read_bytes()
    (finished / "stamps" / "branch" / "europe.json").unlink()
    toy_recipe |= {"track": f"{own / 'own.py'}:OWN"}
    found = spunge.run(toy_recipe, finished)
    lines = [json.loads(line) for line in (branch / "log.jsonl").read_text().splitlines()]
    losses = [(group, values["loss"], step) for group, values, step in told(own) if group.startswith("branches/")]
    assert losses == [("branches/europe", line["loss"], line["step"]) for line in lines]
    scores = {group: values for group, values, step in told(own) if group == "scores/merged"}
    row = next(row for row in found.rows if row.stage == "merged")
    assert scores["scores/merged"][f"{row.metric}/{row.subject}"] == row.value
    assert {file: file.read_bytes() for file in finished.rglob("*.safetensors")} == before
    assert json.loads((finished / "results.json").read_bytes())["rows"] == json.loads(results)["rows"]
    assert "track" not in (finished / "recipe.yaml").read_text()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "run" / "branches" / "europe" / "log.jsonl"
    file.parent.mkdir(parents=True)
    return file


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in steps)


class Kept:
    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, float], int]] = []

    def scalars(self, group: str, values: Any, step: int) -> None:
        self.told.append((group, dict(values), step))


def test_each_step_is_told_once_and_a_log_that_is_begun_anew_from_its_start(log: Path, tmp_path: Path) -> None:
    kept = Kept()
    write_text(log, lines(1, 2))
    following = Following(SILENT, tmp_path / "run", kept)
    following.look(told=False)  # of an earlier command
    half = '{"step": 4, "lo'
    for added, steps in ((lines(3), [3]), (half, []), (lines(4).removeprefix(half), [4]), (lines(4), []), ("", [])):
        append_text(log, added)
        following.look()
        assert [step for _, _, step in kept.told] == steps
        kept.told.clear()
    write_text(log, lines(1, 2, 3, 4, 5))
    following.look()
    assert kept.told == [("branches/europe", {"loss": float(step)}, step) for step in range(1, 6)]


def test_only_numbers_that_are_finite_are_told(log: Path, tmp_path: Path) -> None:
    kept = Kept()
    log.write_text('{"step": 1, "loss": NaN, "rate": 0.5, "why": "x"}\n[1]\nnonsense\n{"step": 2, "loss": Infinity}\n')
    Following(SILENT, tmp_path / "run", kept).look()
    assert kept.told == [("branches/europe", {"rate": 0.5}, 1)]


def recipe(toy_recipe: dict[str, Any], kind: str) -> Any:
    return load_recipe({**toy_recipe, "track": kind})


def test_a_tracker_that_fails_on_the_way_is_told_of_once_and_the_run_goes_on(
    toy_recipe: dict[str, Any], own: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own / "broken").touch()
    with (
        caplog.at_level(logging.WARNING),
        tracked(recipe(toy_recipe, f"{own / 'own.py'}:OWN"), log.parents[2], SILENT) as told_too,
    ):
        log.write_text(lines(1, 2, 3))
        told_too.begin("a")
        told_too.end("done")
    assert [each.getMessage() for each in caplog.records] == [
        "track: OSError: the network is gone; the run goes on without it"
    ]


def test_a_tracker_that_cannot_begin_is_refused(toy_recipe: dict[str, Any], own: Path, tmp_path: Path) -> None:
    (own / "closed").touch()
    made = recipe(toy_recipe, f"{own / 'own.py'}:OWN")
    with pytest.raises(RecipeError, match=r"it cannot begin .OSError: no such server"), tracked(made, tmp_path, SILENT):
        pass


def test_a_package_that_is_not_there_is_refused_before_anything_is_written(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.run.tracking.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^track: wandb: wandb is not installed; pip install 'spunge\[wandb\]'"):
        spunge.run({**toy_recipe, "track": "wandb"}, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.json"))


def test_what_is_told_of_the_recipe_holds_no_secret(
    toy_recipe: dict[str, Any], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a-very-secret-thing"
    toy_recipe["published"] = [
        {"stage": "merged", "subject": "a", "metric": "b", "value": 1, "source": f"said {secret}"}
    ]
    made = recipe(toy_recipe, f"{own / 'own.py'}:OWN")
    monkeypatch.setenv("MY_API_KEY", secret)  # a recipe that holds what is known for one is refused as it is loaded
    with tracked(made, tmp_path, SILENT):
        pass
    text = (own / "recipe.json").read_text()
    assert secret not in text
    assert json.loads(text)["unlearn"]["method"] == toy_recipe["unlearn"]["method"]


def test_who_is_told_is_no_part_of_the_recipe_that_a_run_keeps(toy_recipe: dict[str, Any]) -> None:
    assert dump_recipe(recipe(toy_recipe, "tensorboard")) == dump_recipe(load_recipe(toy_recipe))


def test_the_trainings_of_every_seed_and_control_are_told(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    # Where they lie is asked of the stages themselves.
    recipe = load_recipe(toy_recipe | {"seeds": 2, "controls": ["joint"]})
    kept, folder = Kept(), tmp_path / "run"
    trainings = [training for seed in build(recipe, folder).seeds for training in seed.trainings]
    for training in trainings:
        write_text(training.folder / "log.jsonl", lines(1))
    Following(SILENT, folder, kept).look()
    assert {group for group, _, _ in kept.told} == {each.folder.relative_to(folder).as_posix() for each in trainings}
    assert any(group.startswith("seeds/") for group, _, _ in kept.told)
