"""Completions: what a plain loop over single prompts writes, kept, taken up again, and drawn the same again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation import generation
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions, prompt_ids
from spunge.files import sealed
from templates import CHATML, LLAMA_3, byte_tokenizer
from toys import ARCHITECTURES, texts

PROMPTS = [*texts("prompts", 9), "the"]
SHORT = GenerationSettings(max_new_tokens=7)


def bench(tmp_path: Path, model: str = "m") -> Bench:
    return Bench("base", model, tmp_path, tmp_path)


def one_by_one(base: Any, prompt: str, count: int) -> str:
    """Greedy decoding without a cache."""
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = int(base.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return str(base.tokenizer.decode(ids[0], skip_special_tokens=True))[len(base.tokenizer.decode(ids[0, :start])) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_completions_are_those_of_a_plain_loop(
    load: Callable[..., Any], tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(architecture)
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 60)
    found = completions(base, PROMPTS, SHORT, bench(tmp_path))
    assert found == [[one_by_one(base, prompt, 7)] for prompt in PROMPTS]


def test_texts_are_taken_up_where_a_killed_run_stopped(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load()
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 60)
    sampled = GenerationSettings(max_new_tokens=7, temperature=1.0, samples=2)
    whole = completions(base, PROMPTS, sampled, bench(tmp_path / "whole"))
    completions(base, PROMPTS, sampled, bench(tmp_path / "cut"))
    [file] = (tmp_path / "cut").glob("texts-*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:10])
    calls: list[int] = []
    write = base.model.generate
    monkeypatch.setattr(base.model, "generate", lambda **given: calls.append(len(given["input_ids"])) or write(**given))
    assert completions(base, PROMPTS, sampled, bench(tmp_path / "cut")) == whole
    assert 0 < sum(calls) < len(PROMPTS)
    assert all(json.loads(line) for line in file.read_text().splitlines())
    calls.clear()
    assert completions(base, PROMPTS, sampled, bench(tmp_path / "cut")) == whole
    assert not calls


def test_another_models_texts_are_not_taken(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    before = completions(base, PROMPTS, SHORT, bench(tmp_path))
    with torch.no_grad():
        base.model.get_output_embeddings().weight.mul_(-1)
    assert completions(base, PROMPTS, SHORT, bench(tmp_path)) == before  # the same fingerprint: kept
    assert completions(base, PROMPTS, SHORT, bench(tmp_path, "other")) != before


def test_samples_differ_from_each_other_and_are_drawn_the_same_again(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    sampled = GenerationSettings(max_new_tokens=7, temperature=1.5, samples=4)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    found = completions(base, PROMPTS, sampled, bench(tmp_path / "one"))
    assert torch.equal(torch.get_rng_state(), state)
    assert {len(each) for each in found} == {4}
    assert any(len(set(each)) > 1 for each in found)
    torch.manual_seed(12)
    assert completions(base, PROMPTS, sampled, bench(tmp_path / "two")) == found
    another = sampled.model_copy(update={"seed": 1})
    assert completions(base, PROMPTS, another, bench(tmp_path / "one")) != found


def test_greedy_decoding_gives_no_several_samples() -> None:
    with pytest.raises(ValueError, match="set temperature"):
        GenerationSettings(samples=25)
    with pytest.raises(ValueError, match="seed: greedy decoding draws nothing; set temperature"):
        GenerationSettings(seed=3)


def test_a_long_prompt_loses_its_start_and_an_empty_one_gets_a_start_token(load: Callable[..., Any]) -> None:
    base = load()
    whole = base.tokenizer("red green blue dog cat")["input_ids"]
    assert prompt_ids(base, "red green blue dog cat", GenerationSettings(max_prompt=3)) == whole[-3:]
    assert prompt_ids(base, "", SHORT) == [base.tokenizer.bos_token_id]


def test_chat_needs_a_template(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    with pytest.raises(RecipeError, match="no chat template"):
        completions(base, ["the dog"], GenerationSettings(chat=True), bench(tmp_path))
    base.tokenizer.chat_template = "{% for m in messages %}the {{ m['content'] }} sun{% endfor %}"
    assert prompt_ids(base, "dog", GenerationSettings(chat=True)) == base.tokenizer("the dog sun")["input_ids"]


def test_the_space_before_a_completion_is_kept_where_a_tokenizer_drops_it(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    """The toy tokenizer joins words with spaces when it decodes, so a completion decoded alone begins without one."""
    base = load()
    [[text]] = completions(base, ["the dog runs"], SHORT, bench(tmp_path))
    assert text.startswith(" ")


def test_a_completion_with_unusual_line_breaks_is_taken_up(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    completions(base, ["the dog", "the cat"], SHORT, bench(tmp_path))
    [file] = tmp_path.glob("texts-*.jsonl")
    odd = [json.dumps(sealed({"row": row, "texts": ["one\u2028two\x85three"]}), ensure_ascii=False) for row in (0, 1)]
    file.write_text("\n".join(odd) + "\n", encoding="utf-8")
    assert completions(base, ["the dog", "the cat"], SHORT, bench(tmp_path)) == [["one\u2028two\x85three"]] * 2


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("positions", "most"), [(None, 12), (19, 12), (None, 1)])
def test_a_prompt_that_is_cut_keeps_its_start_token(
    load: Callable[..., Any], chat: bool, positions: int | None, most: int
) -> None:
    tokenizer = byte_tokenizer(LLAMA_3.replace("<|begin_of_text|>", "<s>"), bos=True)
    base = replace(load(), tokenizer=tokenizer, positions=positions)
    settings = GenerationSettings(max_new_tokens=7, chat=chat, max_prompt=1024 if positions else most)
    whole = prompt_ids(replace(base, positions=None), "ask " * 30, GenerationSettings(chat=chat))
    cut = prompt_ids(base, "ask " * 30, settings)
    assert whole[0] == tokenizer.bos_token_id
    assert cut == ([whole[0], *whole[-most + 1 :]] if most > 1 else whole[-1:])
    assert len(cut) == most


def test_a_prompt_that_begins_without_a_start_token_gets_none_when_it_is_cut(load: Callable[..., Any]) -> None:
    base = replace(load(), tokenizer=byte_tokenizer(CHATML))
    for chat in (False, True):
        whole = prompt_ids(base, "ask " * 30, GenerationSettings(chat=chat))
        assert prompt_ids(base, "ask " * 30, GenerationSettings(chat=chat, max_prompt=9)) == whole[-9:]


@pytest.mark.parametrize(
    "content", [{}, {"row": "0", "texts": ["a"]}, {"row": 0, "texts": "a"}, {"row": 0, "texts": [1]}, {"row": None}]
)
def test_kept_lines_of_something_else_are_taken_out(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "texts.jsonl"
    whole = json.dumps(sealed({"row": 1, "texts": ["b"]})) + "\n"
    file.write_text("[" * 100_000 + "\n" + json.dumps(sealed(content)) + "\n" + whole)
    assert generation._written(file, 2) == {1: ["b"]}
    assert file.read_text() == whole
