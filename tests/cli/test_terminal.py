"""All that commands print goes through one place, and nothing that stands in a value is obeyed by the terminal."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import spunge.cli.terminal as terminal
from spunge.cli.samples import print_samples
from spunge.results import parse_results
from spunge.unlearning.showing import Shown

HOSTILE = ":a: \x1b[31m\x1b]0;title\x07\x9b2J\r\u202e[bold]x[/]\ud800"


def test_no_command_prints_past_the_terminal() -> None:
    folder = Path(terminal.__file__).parent
    for file in set(folder.glob("*.py")) - {Path(terminal.__file__)}:
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        }
        assert not {"print", "typer.echo", "typer.secho", "sys.stdout.write"} & called, file.name


def test_every_command_that_shows_progress_keeps_other_libraries_quiet() -> None:
    shown = 0
    for file in Path(terminal.__file__).parent.glob("*.py"):
        for command in ast.parse(file.read_text()).body:
            if not isinstance(command, ast.FunctionDef):
                continue
            called = {ast.unparse(node.func) for node in ast.walk(command) if isinstance(node, ast.Call)}
            shown += "Terminal" in called
            assert "Terminal" not in called or "quiet" in called, command.name
    assert shown >= 5


def test_without_scores_no_heading_of_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "schema": 1,
        "stages": ["base"],
        "parts": [],
        "attribute": None,
        "device": "cpu",
        "dtype": None,
        "seconds": None,
    }
    rest = {"spunge": "0.1.0", "versions": {}, "evaluations": [], "seeds": 1, "rows": [], "differences": []}
    terminal.print_scores(parse_results({**content, **rest}))
    assert capsys.readouterr().out == ""


def test_what_is_said_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(f"one\n{HOSTILE}\n")
    said = capsys.readouterr().out
    assert said.startswith("one\n:a: ")
    assert said.endswith("[bold]x[/]\N{REPLACEMENT CHARACTER}\n\n")
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(said)


def test_json_is_escaped_and_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "日本語", 1.5, None]}
    terminal.print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert "日本語" in said
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e", "\ud800"} & set(said)


@pytest.mark.parametrize("interactive", [True, False])
def test_names_in_the_table_of_scores_are_no_markup_no_emoji_and_no_orders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, interactive: bool
) -> None:
    names = (":a:", "[red]b[/]", "\x1b[31mc\x1b[0m", ":smile:")
    parts = [{"value": name, "slug": f"p{index}"} for index, name in enumerate(names)]
    stages = ["base", *(f"branch:{part['slug']}" for part in parts), "mine::heart:"]
    rows: list[dict[str, Any]] = [
        {"stage": stage, "subject": name, "metric": f"m {name}", "value": 0.5, "higher_is_better": True}
        for stage in stages
        for name in names
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: interactive)
    monkeypatch.setenv("COLUMNS", "300")
    terminal.print_scores(parse_results({"attribute": "x", "parts": parts, "stages": stages, "rows": rows}))
    said = capsys.readouterr().out
    for name in (
        ":a:",
        "[red]b[/]",
        ":smile:",
        "\N{REPLACEMENT CHARACTER}[31mc\N{REPLACEMENT CHARACTER}[0m",
        ":heart:",
    ):
        assert name in said
    assert "\x1b[31m" not in said


@pytest.mark.parametrize("colour", ["1", ""])
def test_samples_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, colour: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", colour)
    pieces = [(f"a {HOSTILE}\n", False), (f"b {HOSTILE}", True)]
    print_samples([Shown(part=HOSTILE, of="forget", given="", row=0, pieces=pieces, ids=[1, 2], tokens=2)])
    said = capsys.readouterr().out
    assert said.count("[bold]x[/]") == 3
    assert said.count(":a: ") == 3
    assert not {"\x07", "\x9b", "\r", "\u202e"} & set(said)
    assert "\x1b[31m" not in said
