"""What results depend on beside a model's weights."""

import json
from pathlib import Path

import pytest

from spunge.weights.folder import description

MODEL = {
    "config.json": '{"eos_token_id": 2, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}',
    "generation_config.json": '{"eos_token_id": 2}',
    "tokenizer.json": "{}",
    "modeling_own.py": "from .inner import layer",
    "inner.py": "layer = 1",
    "README.md": "a model",
    "model.safetensors": "weights",
}


def described(folder: Path, **edits: str) -> bytes:
    """The description of MODEL with some files otherwise. A name's `__` stands for a slash."""
    files = {**MODEL, **{name.replace("__", "/"): text for name, text in edits.items()}}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return b"".join(description(folder))


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "spiece.model", "vocab.bpe"),
        *("qwen.tiktoken", "chat_template.json", "chat_template.jinja", "additional_chat_templates__tools.jinja"),
        *("modeling_own.py", "inner.py"),
    ],
)
def test_each_file_that_a_model_is_read_by_is_told(tmp_path: Path, name: str) -> None:
    before = described(tmp_path / "before")
    assert described(tmp_path / "after", **{name: MODEL.get(name, "{}") + "\n"}) != before


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "model.safetensors", "trainer_state.json", "notes.txt"])
def test_what_no_model_is_read_by_is_not_told(tmp_path: Path, name: str) -> None:
    assert described(tmp_path / "after", **{name: "otherwise"}) == described(tmp_path / "before")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"eos_token_id": 2}, False),
        ({"eos_token_id": [2], "do_sample": True, "temperature": 0.6, "transformers_version": "5"}, False),
        ({"eos_token_id": 2, "repetition_penalty": 1.3}, True),
        ({"eos_token_id": [2, 7]}, True),
        ({}, True),
    ],
)
def test_of_a_generations_configuration_is_told_what_is_obeyed(
    tmp_path: Path, written: dict[str, object], told: bool
) -> None:
    edited = described(tmp_path / "after", **{"generation_config.json": json.dumps(written)})
    assert (edited != described(tmp_path / "before")) == told


def test_a_folder_that_is_named_as_a_file_of_a_tokenizer_is_none(tmp_path: Path) -> None:
    before = described(tmp_path)
    (tmp_path / "tokenizer_old").mkdir()
    assert described(tmp_path) == before
