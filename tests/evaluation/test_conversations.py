"""Conversations are judged as they are learned. The oracle is transformers: its template, its mask, its logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from spunge.data.items import read_items
from spunge.evaluation.generation import GenerationSettings, prompt_ids
from spunge.model.loading import load_base
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.registry import EVALUATORS
from templates import THINKING, byte_tokenizer, said

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|user|><|system|> #}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALKS = [said("ask 1", "tell 1", "ask 2", "tell 2"), said("more", "less", system="be brief")]


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """model(template) -> a tiny model with a tokenizer of bytes that adds a start token, as the template does itself."""
    import shutil

    def make(template: str) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny("llama", vocab_size=288, max_position_embeddings=512), folder, dirs_exist_ok=True)
        byte_tokenizer(template, bos=True).save_pretrained(folder)
        return folder

    return make


def expected(folder: Path, learn: str) -> tuple[list[float], list[int]]:
    """Of each conversation: the summed negative log-likelihood of what transformers' mask marks, and how many tokens that is."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = byte_tokenizer(MARKED, bos=True)
    losses, counts = [], []
    for talk in TALKS:
        out = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor(out["input_ids"]), torch.tensor(out["assistant_masks"]).bool()
        if learn == "last":
            mask[: int((~mask).nonzero()[-1])] = False
        with torch.no_grad():
            logs = network(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses.append(-float(logs[:-1].gather(1, ids[1:, None])[mask[1:], 0].sum()))
        counts.append(int(mask.sum()))
    return losses, counts


@pytest.mark.parametrize("learn", ["last", "all"])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_perplexity_of_conversations_is_that_of_the_assistants_turns(
    model: Callable[[str], Path], write_rows: Callable[..., Path], tmp_path: Path, template: str, learn: str
) -> None:
    folder = model(template)
    recipe = {
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
        "forget": {
            "source": str(write_rows("talks.jsonl", [{"m": talk} for talk in TALKS])),
            "messages": "m",
            "learn": learn,
        },
        "unlearn": {"method": "tvn", "steps": 1},
        "controls": [],
        "evaluate": [{"kind": "perplexity"}],
    }
    results = spunge.run(spunge.load_recipe(recipe), tmp_path / "run")
    losses, counts = expected(folder, learn)
    found = next((tmp_path / "run" / "evaluation" / "base").glob("*.json"))
    [measure] = json.loads(found.read_text())["measures"]
    assert measure["denominator"] == counts
    assert measure["numerator"] == pytest.approx(losses, rel=1e-4)
    assert results.folder == tmp_path / "run"


def test_an_evaluations_items_differ_with_the_way_in_which_they_are_rendered(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    prints = set()
    for changes in ({}, {"learn": "all"}, {"answer_end": "none"}):
        toy_recipe["forget"] = {
            "source": str(write_rows("talks.jsonl", [{"m": talk, "topic": "a"} for talk in TALKS])),
            "messages": "m",
            **changes,
        }
        toy_recipe["evaluate"] = [{"kind": "perplexity"}]
        recipe = load_recipe(toy_recipe)
        entry = recipe.evaluate[0]
        columns = EVALUATORS.get("perplexity").columns(entry, recipe.forget.columns)
        prints.add(read_items(recipe, entry, columns, "evaluate.0").sha256)
    assert len(prints) == 3


def test_a_conversation_to_judge_that_has_no_known_shape_is_named(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    bad = write_rows("bad.jsonl", [{"m": TALKS[0], "topic": "a"}, {"m": said("q"), "topic": "a"}])
    toy_recipe["evaluate"] = [{"kind": "perplexity", "source": str(bad), "messages": "m"}]
    with pytest.raises(
        spunge.RecipeError, match=r"evaluate\.0\.messages: row 2 of bad.jsonl: no message is the assistant's"
    ):
        spunge.run(spunge.load_recipe(toy_recipe), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("delta.safetensors"))


def test_generation_is_asked_as_training_was_rendered(model: Callable[[str], Path]) -> None:
    folder = model(PLAIN)
    base = load_base(folder, ModelSettings(path=str(folder), dtype="float32"))
    asked = base.tokenizer.apply_chat_template(
        said("ask"), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids(base, "ask", GenerationSettings(chat=True)) == asked
    assert asked.count(base.tokenizer.bos_token_id) == 1
    folder = model(THINKING)
    for variables, prompt in (({}, "<|im_start|>assistant\n"), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")):
        settings = ModelSettings(path=str(folder), dtype="float32", template=variables)
        base = load_base(folder, settings)
        assert base.tokenizer.decode(prompt_ids(base, "ask", GenerationSettings(chat=True))).endswith(prompt)
