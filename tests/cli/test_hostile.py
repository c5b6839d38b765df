"""Every command over a run in which all that people and files can name is hostile: nothing is obeyed, and no key is told."""

import html
import json
import logging
import os
import re
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import yaml

import spunge
from commands import Ended, call
from picked import few
from spunge.cli.terminal import quiet
from spunge.errors import HIDDEN, RecipeError, one_line, redacted
from spunge.progress import Terminal
from spunge.recipe.loading import load_recipe
from toys import rows

ORDERS = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\u202e\u2066\u200f"
SAID = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029]")
MARKUP = "<script>alert(1)</script> [bold]x[/] | `` ``` \n---\n# head =cmd|' /C calc'!A0 &amp; ]]>"
HOSTILE = f"a{ORDERS}{MARKUP}"

HUB = "hf_" + "Ab1" * 11 + "Z"
SECRETS = {
    "HF_TOKEN": HUB,
    "HUGGING_FACE_HUB_TOKEN": "unusual-shape-of-a-token",
    "OPENAI_API_KEY": "sk-proj-" + "x1" * 20,
    "MY_SERVICE_PASSWORD": "correct horse battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}


class Hostile(NamedTuple):
    folder: Path
    recipe: str
    run: Path


@pytest.fixture(scope="module")
def hostile(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    """A finished run whose values, names, labels, files and folders hold orders to a terminal and markup."""
    folder = tmp_path_factory.mktemp("hostile") / "f \x1b[31m\u202e<b>"
    folder.mkdir()

    def write(name: str, content: list[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(folder / name)

    forget = [{**row, "topic": HOSTILE} for row in rows(["europe"], 6)] + rows(["asia"], 6)
    forget[0]["text"] += f" {HOSTILE}"
    questions = [
        {"topic": topic, "question": f"{HOSTILE} is", "choices": ["paris", HOSTILE], "answer": 0}
        for topic in (HOSTILE, "asia")
        for _ in range(3)
    ]
    (folder / "model\x1b[2J\x07").symlink_to(tiny("llama"))
    recipe = {
        "model": {"path": str(folder / "model\x1b[2J\x07"), "dtype": "float32"},
        "forget": {"source": write("rows\x1b]0;x\x07.jsonl", forget)},
        "split": {"by": "topic"},
        "retain": {"source": write("retain.jsonl", rows(["other"], 6))},
        "unlearn": {"method": "rmu", "layer": 2, "steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "controls": ["average"],
        "evaluate": [
            {"kind": "choices", "name": f"name {HOSTILE}", "source": write("questions.jsonl", questions)},
            {
                "kind": "audit",
                "of": f"name {HOSTILE}",
                "attack": {"kind": "quantise", "bits": "int8"},
                "label": f"label {HOSTILE}",
            },
        ],
        "published": [
            {"stage": "merged", "subject": HOSTILE, "metric": "accuracy", "value": 0.5, "source": f"paper {HOSTILE}"}
        ],
    }
    file = folder / "recipe\x1b[31m\u202e.yaml"
    file.write_text(yaml.safe_dump(recipe))
    spunge.run(load_recipe(str(file)), folder / "run\x1b[0m")
    return Hostile(folder, str(file), folder / "run\x1b[0m")


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


COMMANDS: dict[str, Callable[[Hostile, Path], list[str]]] = {
    "run": lambda made, out: ["run", made.recipe, "--out", str(made.run)],
    "run anew": lambda made, out: ["run", made.recipe, "--out", str(out / "r\x1b[1m"), "--set", "evaluate=[]"],
    "plan": lambda made, out: ["plan", made.recipe, "--out", str(made.run)],
    "plan changed": lambda made, out: ["plan", made.recipe, "--out", str(made.run), "--set", "unlearn.steps=3"],
    "split": lambda made, out: ["split", made.recipe, "--show", "3"],
    "split dropped": lambda made, out: ["split", made.recipe, "--set", "split.values=[asia]"],
    "status": lambda made, out: ["status", str(made.run)],
    "verify": lambda made, out: ["verify", str(made.run)],
    "report": lambda made, out: ["report", str(made.run)],
    "compare": lambda made, out: ["compare", str(made.run), str(made.run)],
    "merge": lambda made, out: [
        *("merge", "--base", str(made.folder / "model\x1b[2J\x07"), "--out", str(out / "m\x1b[1m")),
        *("--model", str(next(made.run.glob("branches/*")))),
    ],
    "list": lambda made, out: ["list"],
    "env": lambda made, out: ["env"],
    # What is wrong is said of names that give orders.
    "no recipe": lambda made, out: ["run", f"no {ORDERS}"],
    "no setting": lambda made, out: ["plan", made.recipe, "--set", f"unlearn.{ORDERS}=1"],
    "no value": lambda made, out: ["plan", made.recipe, "--set", f"unlearn.method=x{ORDERS}"],
    "no column": lambda made, out: ["split", made.recipe, "--set", f"forget.text=y{ORDERS}"],
    "no condition": lambda made, out: ["split", made.recipe, "--set", f"forget.where=error('x{ORDERS}')"],
    "no cast": lambda made, out: ["split", made.recipe, "--set", "forget.where=CAST(topic AS INT) > 1"],
    "no run": lambda made, out: ["status", str(out / f"n{ORDERS}")],
    "no verify": lambda made, out: ["verify", str(out / f"n{ORDERS}")],
    "no option": lambda made, out: [f"--x{ORDERS}"],
    "no command": lambda made, out: [f"c{ORDERS}"],
    "no model": lambda made, out: ["merge", "--base", str(out / f"x{ORDERS}"), "--model", "y", "--out", str(out / "o")],
    "no kind": lambda made, out: ["list", f"k{ORDERS}"],
    "no shipped": lambda made, out: ["init", f"k{ORDERS}"],
    "no texts": lambda made, out: ["clean", str(out / f"x{ORDERS}"), "--texts"],
}
WITH_JSON = ("run", "plan", "split", "status", "verify", "report", "compare", "list", "env")


def harmless(ended: Ended) -> None:
    for shown in (ended.stdout, ended.stderr):
        assert SAID.findall(shown) == []
        assert not any(secret in shown for secret in SECRETS.values())


@pytest.mark.parametrize(
    ("name", "as_json"),
    few([*((name, False) for name in COMMANDS), *((name, True) for name in WITH_JSON)], *range(2, 40)),
)
def test_a_command_shows_what_is_hostile_and_never_sends_it_to_the_terminal(
    hostile: Hostile, tmp_path: Path, name: str, as_json: bool
) -> None:
    ended = call(*COMMANDS[name](hostile, tmp_path), *(["--json"] if as_json else []))
    harmless(ended)
    if name.startswith("no "):
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
    else:
        assert (ended.returncode, ended.stderr if ended.returncode else "") == (0, "")
    if as_json:
        json.loads(ended.stdout)


@pytest.mark.parametrize("traceback", ["", "1"])
@pytest.mark.parametrize(
    "text", [ORDERS, *SECRETS.values(), f"https://user:{HUB}@huggingface.co/x", f"Bearer {HUB}", "https://me:pw@host/x"]
)
def test_an_error_of_any_library_is_shown_without_orders_and_keys(
    monkeypatch: pytest.MonkeyPatch, text: str, traceback: str
) -> None:
    monkeypatch.setenv("SPUNGE_TRACEBACK", traceback)
    with patch("spunge.cli.listing.listing", side_effect=ZeroDivisionError(f"by {text} <")):
        ended = call("list")
    harmless(ended)
    assert "pw@" not in ended.stderr
    assert ended.returncode == 1
    assert ended.stderr.rstrip().startswith("Traceback" if traceback else "spunge: ZeroDivisionError: by ")


@pytest.mark.parametrize("interactive", [True, False])
def test_progress_obeys_nothing(capsys: pytest.CaptureFixture[str], interactive: bool) -> None:
    from rich.console import Console

    with patch(
        "spunge.progress.ERRORS", Console(stderr=True, force_terminal=interactive, color_system=None, width=300)
    ):
        watcher = Terminal()
        watcher.begin(f"title {ORDERS} {HUB}")
        watcher.step(1, 2, f"note {ORDERS} {HUB}")
        watcher.end(f"outcome {ORDERS} {HUB}")
    shown = capsys.readouterr().err
    assert "title" in shown
    assert HUB not in shown
    assert not {"\x07", "\x9b", "\x08", "\u202e", "\u2066"} & set(shown)
    assert "\x1b[31m" not in shown
    assert "\x1b]0" not in shown


def test_what_libraries_warn_and_log_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        quiet()
        quiet()
        warnings.simplefilter("always", UserWarning)
        warnings.warn(f"warned {ORDERS} {HUB}", UserWarning, stacklevel=1)
        logger = logging.getLogger("some.library")
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        logger.warning("logged %s %s", ORDERS, HUB)
        logger.removeHandler(handler)
    shown = capsys.readouterr().err
    assert shown.count(HIDDEN) == 2
    assert "warned" in shown
    assert "logged" in shown
    assert SAID.findall(shown) == []


@pytest.mark.parametrize(
    "setting",
    [
        f"model.path={HUB}",
        f"model.revision={HUB}",
        f"forget.source=https://{HUB}@huggingface.co/x.jsonl",
        "forget.source=https://me:pass@host/x.jsonl",
        f"model.template={{token: {HUB}}}",
        f"evaluate=[{{kind: lm_eval, tasks: [piqa], overrides: {{piqa: {{dataset_kwargs: {{token: {HUB}}}}}}}}}]",
        f"evaluate=[{{kind: lm_eval, tasks: [piqa], overrides: {{piqa: {{'{HUB}': 1}}}}}}]",
        "forget.where=text = 'correct horse battery'",
        "published=[{stage: merged, subject: x, metric: y, value: 1, source: unusual-shape-of-a-token}]",
    ],
)
def test_a_recipe_with_a_key_is_refused_without_telling_it(toy_recipe: dict[str, Any], setting: str) -> None:
    with pytest.raises(RecipeError, match="holds a token or key") as refused:
        load_recipe(toy_recipe, [setting])
    assert not any(secret in str(refused.value) for secret in (*SECRETS.values(), "pass@"))


def test_a_key_for_which_there_is_no_setting_is_not_told(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["model"]["token"] = "s3cr3t-of-no-known-shape"
    with pytest.raises(RecipeError) as refused:
        load_recipe(toy_recipe)
    assert "s3cr3t" not in str(refused.value)


def test_no_file_of_a_run_holds_a_key(hostile: Hostile, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("run", hostile.recipe, "--out", str(out)).returncode == 0
    files = [
        file for file in [*out.rglob("*"), *(tmp_path.with_name(f"{tmp_path.name}-cache")).rglob("*")] if file.is_file()
    ]
    assert len(files) > 20
    told = {file.name for file in files for secret in SECRETS.values() if secret.encode() in file.read_bytes()}
    assert told == set()


@pytest.mark.parametrize(
    "plain",
    [
        "hf_internal_testing/tiny",
        "sk-learn",
        "https://huggingface.co/a/b?x=1",
        "me@example.org",
        "a token: none",
        "https://host/@user/x",
        "hf_transfer",
        "sha256 9b74c9897bac770ffc029102a200c5de",
        "key=value",
    ],
)
def test_what_is_no_key_stays_as_it_is(plain: str) -> None:
    assert redacted(plain) == plain
    assert one_line(plain) == plain


@pytest.mark.parametrize(
    "written",
    [str, json.dumps, lambda value: json.dumps(value, ensure_ascii=False), html.escape, lambda value: f"<{value}>"],
    ids=["plain", "json", "json of any letters", "html", "in a text"],
)
def test_a_key_is_hidden_however_it_is_spelled(monkeypatch: pytest.MonkeyPatch, written: Callable[[str], str]) -> None:
    monkeypatch.setenv("SOME_PASSWORD", 'pa"ss & \\ wörd<12>\n')
    assert redacted(written('pa"ss & \\ wörd<12>')) == written("SECRET").replace("SECRET", HIDDEN)


def test_of_a_key_that_begins_with_another_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "one-two-three")
    monkeypatch.setenv("OTHER_TOKEN", "one-two-three-four")
    assert redacted("one-two-three-four, one-two-three") == f"{HIDDEN}, {HIDDEN}"


def test_a_key_that_is_set_or_changed_later_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first-value-of-it", "other-value-of-it"):
        assert redacted(f"it is {value}") == f"it is {value}"
        monkeypatch.setenv("SOME_TOKEN", value)
        assert redacted(f"it is {value}") == f"it is {HIDDEN}"


def test_looking_for_keys_takes_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        monkeypatch.setenv(f"VARIABLE_{number}", f"some value of it {number}")
    short, long = "a word", "a sentence of some more words"
    redacted(long)
    plain = min(timeit.repeat(lambda: [(name, os.environ.get(name)) for name in os.environ], number=20, repeat=5))
    assert min(timeit.repeat(lambda: redacted(long), number=20, repeat=5)) < plain
    assert min(timeit.repeat(lambda: redacted(short), number=20, repeat=5)) < plain / 20
