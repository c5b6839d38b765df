"""`spunge init`: at a terminal what is missing is asked for, elsewhere refused in one line; a recipe is written, nothing run."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Ended, call
from templates import CHATML
from toys import texts


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """answered(["a", ""], "model") -> what `spunge init model` says to a person who types these lines."""

    def init(answers: list[str], *arguments: str) -> Ended:
        monkeypatch.setattr("spunge.cli.asking.is_person", lambda: True)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in answers)))
        return call("init", *arguments, cwd=tmp_path)

    return init


def write(folder: Path, row: Callable[[str, str], dict[str, Any]]) -> None:
    rows = [row(topic, text) for topic in ("asia", "europe") for text in texts(topic, 5)]
    (folder / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def recipe_of(ended: Ended, folder: Path) -> dict[str, Any]:
    assert ended.returncode == 0, ended.stderr
    recipe: dict[str, Any] = yaml.safe_load((folder / ended.stdout.strip().splitlines()[-1]).read_text())
    return recipe


def test_everything_is_asked_where_nothing_is_said(
    answered: Callable[..., Ended], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path, lambda topic, text: {"riddle": text, "solution": text, "mood": topic, "place": topic})
    model = str(tiny("llama"))
    recipe = recipe_of(answered([model, "bad.jsonl", "riddle", "solution", "place", "", "ga"]), tmp_path)
    assert recipe["model"] == {"path": model, "dtype": "auto"}
    assert recipe["forget"]["completion"] == "solution"
    assert recipe["split"] == {"by": "place"}
    assert recipe["unlearn"]["method"] == "ga"
    assert recipe["retain"]["source"]["path"] == "neutral"
    assert not (tmp_path / "runs").exists()


def test_what_is_said_or_can_be_guessed_is_not_asked(
    answered: Callable[..., Ended], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path, lambda topic, text: {"question": text, "answer": text, "topic": topic})
    ended = answered([], str(tiny("llama")), "--forget", "bad.jsonl", "--method", "tvn")
    assert recipe_of(ended, tmp_path)["split"] == {"by": "topic"}
    assert "[" not in ended.stderr


def test_a_column_of_conversations_is_taken_as_that(
    answered: Callable[..., Ended], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    turns = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": text}]  # noqa: E731
    write(tmp_path, lambda topic, text: {"talk": turns(text), "note": text})
    ended = answered(["talk"], str(tiny("llama")), "--forget", "bad.jsonl")
    assert "has no chat template" in ended.stderr
    model = shutil.copytree(tiny("llama"), tmp_path / "chat")
    (model / "chat_template.jinja").write_text(CHATML)
    recipe = recipe_of(answered(["talk"], str(model), "--forget", "bad.jsonl"), tmp_path)
    assert recipe["forget"]["messages"] == "talk"


def test_no_answer_and_nobody_to_ask_are_refused_in_one_line(
    answered: Callable[..., Ended], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    for arguments, said in (
        ([], "init: RECIPE|MODEL: missing; give a shipped recipe's name, or a model and --forget ROWS"),
        ([str(tiny("llama"))], "give --forget ROWS"),
        (
            ["org/model"],
            "recipe: no file 'org/model', nor a shipped recipe of that name; of a model give --forget ROWS too",
        ),
    ):
        ended = call("init", *arguments, cwd=tmp_path)
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
        assert said in ended.stderr
    assert "init: Model (a folder or a Hub id), or a shipped recipe's name: no answer came" in answered([]).stderr
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".yaml"]


def test_a_recipe_that_is_written_elsewhere_names_the_same_rows(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path, lambda topic, text: {"question": text, "answer": text, "topic": topic})
    (tmp_path / "there").mkdir()
    ended = call("init", str(tiny("llama")), "--forget", "bad.jsonl", "--to", "there", cwd=tmp_path)
    recipe = recipe_of(ended, tmp_path)
    assert recipe["forget"]["source"] == str(tmp_path / "bad.jsonl")
    split = call("split", ended.stdout.strip(), "--json", cwd=tmp_path)
    assert [part["value"] for part in json.loads(split.stdout)["parts"]] == ["asia", "europe"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_at_a_real_terminal_a_question_is_asked_and_enter_takes_the_usual_answer(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "spunge", "init"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs) as asking:
        os.close(theirs)
        os.write(ours, b"\n")
        assert asking.wait(60) == 0
        shown = os.read(ours, 4096).decode()
        os.close(ours)
    assert "shipped recipe's name [demo]:" in shown
    assert (tmp_path / "demo.yaml").is_file()
