"""`spunge chat`: prompts given or typed, answers as text, JSON and columns."""

import io
import json
from pathlib import Path

import pytest

from spunge.cli import chat as command
from spunge.cli.chat import chat
from spunge.errors import RecipeError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Answers:
    """Models whose answers are known."""

    def __init__(self, *_: object) -> None:
        self.models = [type("Model", (), {"name": name})() for name in ("base", "[red]odd")]
        self.names = [model.name for model in self.models]
        self.asked: list[tuple[str, bool]] = []

    def answer(self, model, prompt, settings, hear=lambda _: None) -> str:  # type: ignore[no-untyped-def]
        for piece in ("first", " [bold]second\x1b[31m"):
            hear(piece)
        return f"{model.name} says {prompt} {settings.chat}"

    def close(self) -> None:
        pass


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spunge.run.asking.Asking", Answers)
    monkeypatch.setattr(command, "quiet", lambda: None)


def test_a_finished_run_answers_given_prompts_as_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat(str(finished), prompts=["tokyo"], max_new_tokens=3, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["prompt"] == "tokyo"
    assert list(told["answers"]) == ["base", "control:joint", "merged"]


def test_what_is_typed_is_asked_line_by_line(
    known: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    chat("run")
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("> ")] == ["> one", "> two"]
    assert "base: first [bold]second\N{REPLACEMENT CHARACTER}[31m\n" in shown.out
    assert shown.err == ""
    monkeypatch.setattr("sys.stdin", Terminal("one\n"))
    chat("run")
    assert capsys.readouterr().err == "> > "


def test_a_terminal_shows_the_answers_in_columns_and_no_markup_is_obeyed(
    known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr("sys.stdout", shown := Terminal())
    chat("run", prompts=["one"])
    last = shown.getvalue()
    assert "[red]odd" in last
    assert "first [bold]second" in last
    assert "\x1b[31m" not in last
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr("sys.stdout", narrow := Terminal())
    chat("run", prompts=["one"])
    assert "[red]odd: first" in narrow.getvalue()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"max_new_tokens": 0}, "--max-new-tokens: "), ({"seed": 3}, "--seed: greedy decoding draws")],
)
def test_settings_that_cannot_be_are_refused_by_their_option(given: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chat("run", **given)  # type: ignore[arg-type]
