"""RUN/progress.json: there while a command is at work, gone afterwards."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.progress import Expected, Silent
from spunge.run import live
from spunge.run.live import told_in
from spunge.view.runs import progress_of


class Heard(Silent):
    """What the folder says as each stage begins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.titles = folder, []

    def begin(self, title: str) -> None:
        progress = progress_of(self.folder)
        assert progress is not None
        self.titles.append([stage["title"] for stage in progress.stages])


def test_while_a_run_is_at_work_its_folder_says_at_what(finished: Path, toy_recipe: dict[str, Any]) -> None:
    heard = Heard(finished)
    (finished / "stamps" / "page.json").unlink()
    spunge.run(toy_recipe, finished, heard)
    assert ["read and split the rows"] in heard.titles
    assert ["page"] in heard.titles
    assert not (finished / "progress.json").exists()
    assert not list(finished.rglob("*.part"))


def test_steps_are_written_and_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 0.0)
    steps: list[tuple[int, int, str]] = []

    class Listener(Silent):
        def step(self, done: int, total: int, note: str = "", /) -> None:
            steps.append((done, total, note))

    with told_in(tmp_path, Listener()) as watcher:
        watcher.expect([Expected("a", "model", 1.0), Expected("b", "model", 1.0)])
        watcher.begin("a")
        watcher.step(1, 4, "loss 2")
        told = json.loads((tmp_path / "progress.json").read_text())
        assert (told["pid"], told["count"], told["finished"], told["waiting"]) == (os.getpid(), 2, 0, ["b"])
        [stage] = told["stages"]
        assert (stage["title"], stage["done"], stage["total"], stage["note"]) == ("a", 1, 4, "loss 2")
        watcher.end("")
        watcher.begin("b")
        assert json.loads((tmp_path / "progress.json").read_text())["finished"] == 1
    assert steps == [(1, 4, "loss 2")]
    assert not (tmp_path / "progress.json").exists()


def failing(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["replace", "write"])
def test_a_run_goes_on_where_its_progress_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    target: tuple[Any, str] = (live.os, "replace") if broken == "replace" else (Path, "write_text")
    monkeypatch.setattr(*target, failing)
    with told_in(tmp_path, Silent()) as watcher:
        watcher.begin("a")
        watcher.step(1, 2, "")
        watcher.end("")
    assert list(tmp_path.iterdir()) == []


def test_no_secret_is_written(tmp_path: Path) -> None:
    with told_in(tmp_path, Silent()) as watcher:
        watcher.begin("judge hf_" + "a" * 34)
        assert "hf_" not in (tmp_path / "progress.json").read_text()
