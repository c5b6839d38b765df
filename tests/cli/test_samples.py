"""`spunge split --show`: what the model will be given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spunge.cli.run import split
from templates import CHATML, byte_tokenizer, said


@pytest.fixture
def recipe(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., str]:
    """A recipe on a model of which there is a tokenizer and nothing else."""
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "model")

    def make(rows: list[dict[str, Any]], columns: dict[str, Any], **blocks: Any) -> str:
        content = {
            "model": {"path": str(tmp_path / "model")},
            "forget": {"source": str(write_rows("rows.jsonl", rows)), **columns},
            "split": {"by": "topic"},
            "unlearn": {"method": "tvn", "steps": 1},
            **blocks,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return make


PAIRS = [{"prompt": f"ask {n}", "completion": f" tell {n}", "topic": "ab"[n % 2]} for n in range(8)]
COLUMNS = {"prompt": "prompt", "completion": "completion"}


def test_as_many_samples_of_each_part_as_asked_for_with_what_is_learned(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    split(recipe(PAIRS, COLUMNS), show=2, as_json=True)
    told = json.loads(capsys.readouterr().out)
    samples = told["samples"]
    assert [(sample["part"], sample["row"]) for sample in samples] == [("a", 1), ("a", 3), ("b", 2), ("b", 4)]
    assert samples[0]["text"] == "ask 0 tell 0</s>"
    assert samples[0]["scored"] == " tell 0</s>"
    assert samples[0]["ids"] == [*byte_tokenizer(CHATML)("ask 0 tell 0")["input_ids"], 257]
    assert "without a chat template" in told["form"]
    split(recipe(PAIRS, {**COLUMNS, "chat": True}), show=1, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["samples"][0]["scored"] == "tell 0<|im_end|>"
    assert "through the chat template" in told["form"]


def test_retain_rows_are_shown_too_and_texts_are_cut_as_training_cuts_them(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], write_rows: Callable[..., Path]
) -> None:
    retain = {"source": str(write_rows("retain.jsonl", [{"text": "0123456789"}])), "text": "text"}
    file = recipe(PAIRS, COLUMNS, retain=retain, unlearn={"method": "tvn", "steps": 1, "max_lengths": {"retain": 5}})
    split(file, show=1, as_json=True)
    last = json.loads(capsys.readouterr().out)["samples"][-1]
    assert (last["part"], last["of"], last["text"], last["scored"]) == ("retain", "retain", "01234", "01234")
    assert last["tokens"] == 10


def test_every_answer_is_marked_in_brackets_or_in_a_terminal_in_reverse(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [{"m": said("q1", "a [1]", "q2", "a2"), "topic": "a"}]
    file = recipe(chats, {"messages": "m", "learn": "all"})
    split(file, show=3)
    out = capsys.readouterr().out
    assert "part a, row 1" in out
    assert "q1<|im_end|>\n<|im_start|>assistant\n[[a [1]<|im_end|>]]\n<|im_start|>user\nq2" in out
    assert "[[a2<|im_end|>]]" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    split(file, show=3)
    out = capsys.readouterr().out
    assert "\x1b[7ma2<|im_end|>\x1b[0m" in out
    assert "[[" not in out


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("idk", [("refusal", "ask 0 no idea</s>", " no idea</s>")]),
        ("dpo", [("to forget", "ask 0 tell 0</s>", " tell 0</s>"), ("to prefer", "ask 0 no idea</s>", " no idea</s>")]),
    ],
)
def test_refusals_are_shown_as_the_method_is_given_them(
    recipe: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    method: str,
    expected: list[tuple[str, str, str]],
) -> None:
    unlearn = {"method": method, "steps": 1, "epochs": None, "alpha": 0, "refusals": ["no idea"]}
    split(recipe(PAIRS[::2], COLUMNS, unlearn=unlearn), show=1, as_json=True)
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [(sample["as"], sample["text"], sample["scored"]) for sample in samples] == expected


def test_packed_texts_are_shown_as_they_are_packed(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"t{n}", "topic": "a"} for n in range(6)]
    file = recipe(rows, {"text": "text"}, unlearn={"method": "tvn", "steps": 1, "packing": True, "max_length": 7})
    split(file, show=2, as_json=True)
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["text"] for sample in samples] == ["t0</s>t1</s>t", "2</s>t3</s>t4"]


def test_a_row_that_cannot_be_used_is_named(recipe: Callable[..., str]) -> None:
    from spunge.errors import RecipeError

    with pytest.raises(
        RecipeError, match=r"^forget\.messages: row 2 of \w+\.jsonl: messages\[1\] \(assistant\) has no content"
    ):
        split(
            recipe(
                [
                    {"m": said("q", "a"), "topic": "a"},
                    {"m": [*said("q"), {"role": "assistant", "content": None}], "topic": "a"},
                ],
                {"messages": "m"},
            )
        )
