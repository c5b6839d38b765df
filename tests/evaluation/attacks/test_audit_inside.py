"""Attacks inside the model and behind the question, against transformers' own hidden states, weights, and finite differences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.attacks import suffix as searching
from spunge.evaluation.attacks.direction import ABLATE, AblateSettings, ablated
from spunge.evaluation.attacks.lens import LENS, LensSettings, read_after
from spunge.evaluation.attacks.suffix import (
    SUFFIX,
    Frame,
    Pair,
    SuffixSettings,
    frame_of,
    gradient_of,
    joined,
    losses_of,
    pairs_of,
    searched,
    text_of,
    usable_tokens,
)
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.choices import CHOICES, ChoicesSettings
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, prompt_ids
from spunge.evaluation.leakage import LeakageSettings
from spunge.evaluation.match import MatchSettings
from spunge.evaluation.perplexity import PerplexitySettings
from spunge.progress import SILENT
from spunge.recipe.loading import load_recipe
from toys import texts

COUNT = 8
QUESTIONS = pa.table(
    {
        "question": texts("questions", COUNT),
        "choices": [["paris", "rome", "tokyo"]] * COUNT,
        "answer": [number % 3 for number in range(COUNT)],
    }
)
TARGET = Target(ChoicesSettings(name="capitals"), QUESTIONS)
IDS = torch.tensor([[1, 5, 9, 30, 7, 12]])
OTHERS = Samples(pa.table({"text": texts("other", 9)}))
FORGET = {name: Samples(pa.table({"text": texts(name, 5)})) for name in ("asia", "europe")}
BENCH = Bench("merged", "model", Path(), Path(), forget=FORGET, retain=OTHERS)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_the_lens_reads_the_hidden_states_of_a_block_through_norm_and_output_layer(
    load: Callable[..., Any], architecture: str
) -> None:
    model = load(architecture).model
    plain = model(IDS, output_hidden_states=True)
    norm = {"llama": "norm", "gpt2": "ln_f", "opt": "decoder.final_layer_norm", "gpt_neox": "final_layer_norm"}
    last = model.base_model.get_submodule(norm[architecture])
    for block in (0, 2):
        expected = model.get_output_embeddings()(last(plain.hidden_states[block + 1]))
        with read_after(model, block):
            torch.testing.assert_close(model(IDS).logits, expected)
    with read_after(model, 3):
        assert torch.equal(model(IDS).logits, plain.logits)
    assert torch.equal(model(IDS).logits, plain.logits)


def test_the_lens_measures_every_block_and_the_last_one_is_the_model_itself(load: Callable[..., Any]) -> None:
    base = load(initializer_range=0.3)
    found = LENS.run(base, LensSettings(block=[1, 1.0]), TARGET, BENCH)
    assert [(each.metric, each.at, each.unit, each.of) for each in found] == [
        ("accuracy by the logit lens, block 1", 1, "block", "accuracy"),
        ("accuracy by the logit lens, block 3", 3, "block", "accuracy"),
    ]
    [plain] = CHOICES.measure(base, TARGET.settings, QUESTIONS, BENCH)
    assert found[1].numerator.tolist() == plain.numerator.tolist()
    with pytest.raises(RecipeError, match=r"evaluate\.attack\.block: 4: the model's blocks are 0 to 3"):
        LENS.run(base, LensSettings(block=4), TARGET, BENCH)


def orthogonalised(model: Any, architecture: str, unit: torch.Tensor) -> None:
    """Take a direction out of every weight and bias that writes to the residual stream, as the paper does."""
    writes = {
        "llama": ("embed_tokens.weight", "o_proj.weight", "down_proj.weight"),
        "gpt2": ("wte.weight", "wpe.weight", "attn.c_proj.weight", "mlp.c_proj.weight", "c_proj.bias"),
        "gpt_neox": ("embed_in.weight", "dense.weight", "dense.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias"),
    }[architecture]
    for name, weight in model.named_parameters():
        if name.endswith(writes):
            # Embeddings, biases and gpt2's matrices have the stream last; linear layers have it first.
            last = weight.ndim == 1 or "emb" in name or architecture == "gpt2"
            wide = weight.data if last else weight.data.T
            wide -= (wide @ unit)[..., None] * unit


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_ablating_a_direction_is_taking_it_out_of_the_weights(load: Callable[..., Any], architecture: str) -> None:
    untied = {"tie_word_embeddings": False}
    base, other = load(architecture, **untied), load(architecture, **untied)
    unit = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    before = base.model(IDS).logits
    orthogonalised(other.model, architecture, unit)
    expected = other.model(IDS, output_hidden_states=True)
    assert float((expected.logits - before).abs().max()) > 1e-3
    with ablated(base.model, unit):
        out = base.model(IDS, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert float((out.hidden_states[-2] @ unit).abs().max()) < 1e-5
    assert torch.equal(base.model(IDS).logits, before)


def test_the_direction_is_the_difference_of_means_at_the_last_token(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "spunge.evaluation.attacks.direction.ablated", lambda model, unit: seen.append(unit) or ablated(model, unit)
    )
    rows = pa.table({"prompt": texts("prompts", 7), "refused": [True, False, True, True, False, False, True]})

    def mean(prompts: list[str]) -> np.ndarray:
        states = []
        for prompt in prompts:
            with torch.no_grad():
                ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
                states.append(base.model(ids, output_hidden_states=True).hidden_states[2][0, -1].double().numpy())
        return np.mean(states, axis=0)

    forgotten = [text for samples in FORGET.values() for text in samples.table["text"].to_pylist()]
    sides = (
        (forgotten, OTHERS.table["text"].to_pylist()),
        (
            [row["prompt"] for row in rows.to_pylist() if row["refused"]],
            [row["prompt"] for row in rows.to_pylist() if not row["refused"]],
        ),
    )
    ABLATE.run(base, AblateSettings(block=1), TARGET, BENCH)
    ABLATE.run(base, AblateSettings(block=1, on="source"), Target(TARGET.settings, QUESTIONS, rows=rows), BENCH)
    for unit, (refused, others) in zip(seen, sides, strict=True):
        difference = mean(refused) - mean(others)
        np.testing.assert_allclose(unit.numpy(), difference / np.linalg.norm(difference), atol=1e-5)


@pytest.mark.parametrize(
    ("attack", "rows", "message"),
    [
        ({"on": "source"}, None, r"^evaluate\.attack\.on: source goes with rows of the audit's own"),
        ({}, [True, False], r"^evaluate\.attack\.on: source goes with rows"),
        ({"on": "source"}, [True, True], r"^evaluate\.attack\.refused: 'refused' is True in the source"),
        ({"on": "source"}, [True, None], r"'refused' is None and True in the source"),
    ],
)
def test_sides_that_give_no_difference_are_told_before_anything_is_trained(
    attack: dict[str, Any], rows: list[Any] | None, message: str
) -> None:
    table = None if rows is None else pa.table({"prompt": texts("p", len(rows)), "refused": rows})
    with pytest.raises(RecipeError, match=message):
        ABLATE.instrument(AblateSettings(**attack), table)


def test_prompts_that_do_not_differ_have_no_direction(load: Callable[..., Any]) -> None:
    same = pa.table({"prompt": ["paris", "paris"], "refused": [True, False]})
    with pytest.raises(RecipeError, match=r"evaluate\.attack\.block: after block 2 the prompts of both sides"):
        ABLATE.run(load(), AblateSettings(on="source"), Target(TARGET.settings, QUESTIONS, rows=same), BENCH)


PAIRS = [Pair(f"{question} is", " rome") for question in texts("asked", 3)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_is_that_of_one_hot_tokens(load: Callable[..., Any], architecture: str) -> None:
    """Against autograd through an explicit one-hot matrix, one pair after the other, in float64."""
    base = load(architecture)
    suffix = np.array([20, 31, 44])
    expected = torch.zeros(3, 128, dtype=torch.float64)
    before = base.model.get_input_embeddings().weight.clone()
    found = gradient_of(base, PAIRS, suffix)
    model = base.model.double()
    matrix = model.get_input_embeddings().weight
    for pair in PAIRS:
        head, tail = base.tokenizer(pair.question)["input_ids"], base.tokenizer(pair.answer)["input_ids"]
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(suffix), 128).double().requires_grad_()
        given = torch.cat([matrix[head], one_hot @ matrix, matrix[tail]])[None]
        logs = model(inputs_embeds=given).logits[0].log_softmax(-1)
        at = torch.arange(len(head) + 2, len(head) + 2 + len(tail))
        (-logs[at, tail].mean() / len(PAIRS)).backward()
        expected += one_hot.grad
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-6)
    assert torch.equal(before.double(), matrix)
    assert not matrix.requires_grad


def test_a_search_lowers_the_loss_that_the_texts_really_have(load: Callable[..., Any]) -> None:
    base = load(initializer_range=0.3)
    attack = SuffixSettings(tokens=4, steps=8, candidates=16, top=32)
    said: list[str] = []

    def told(done: int, total: int, note: str = "", /) -> None:
        said.append(note)

    found = searched(base, attack, PAIRS, np.random.default_rng(0), told)
    plain = searched(base, attack.model_copy(update={"steps": 0}), PAIRS, np.random.default_rng(0), SILENT.step)
    assert found == searched(base, attack, PAIRS, np.random.default_rng(0), SILENT.step)
    start, end = losses_of(base, PAIRS, [plain, found])
    losses = [float(note.removeprefix("loss ")) for note in said]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(end, abs=5e-4)
    assert end < start - 0.5
    by_chance = [text_of(base, np.random.default_rng(seed).choice(usable_tokens(base), 4)) for seed in range(8 * 16)]
    assert np.mean(losses_of(base, PAIRS, by_chance) > end) > 0.98, "hardly one of as many random suffixes is better"
    ids = base.tokenizer(f"{PAIRS[0].question} {found} rome", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        one = -base.model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
    assert losses_of(base, PAIRS[:1], [found])[0] == pytest.approx(float(one), rel=1e-4)


def test_a_suffix_is_searched_under_the_chat_template_that_its_questions_are_put_in(load: Callable[..., Any]) -> None:
    """The loss and the gradient are those of the answer behind the very tokens that the evaluation's generation reads."""
    base = load()
    base.tokenizer.chat_template = (
        "{% for m in messages %}<s> user {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}cat {% endif %}"
    )
    generation = GenerationSettings(chat=True)
    frame = frame_of(base, MatchSettings(words=["x"], generation=generation))
    assert frame == ("<s> user ", " </s> cat ", True)
    assert frame_of(base, MatchSettings(words=["x"])) == Frame()
    pair, suffix = Pair("the sun is", "rome", frame), "dog tree"
    prompt = prompt_ids(base, joined(pair.question, suffix), generation)
    answer = base.tokenizer("rome", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    expected = -float(logs[len(prompt) - 1, answer[0]])
    assert losses_of(base, [pair], [suffix])[0] == pytest.approx(expected, rel=1e-4)
    ids = np.array(base.tokenizer(suffix, add_special_tokens=False)["input_ids"])
    coded, start = searching._assembled(base, pair, ids)
    assert coded.ids == [*prompt, *answer]
    assert coded.ids[start : start + len(ids)] == ids.tolist()


def test_no_question_is_asked_with_a_suffix_that_knows_its_answer(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[set[str]] = []
    asked: list[str] = []

    def search(_base: Any, _attack: Any, pairs: list[Pair], *_: Any) -> str:
        learned.append({pair.question for pair in pairs})
        return f"suffix{len(learned) - 1}"

    def measured_over(_base: Any, target: Target, _bench: Any, variants: Any) -> Any:
        asked.extend(variant for [variant] in variants)
        return CHOICES.measure(base, target.settings, target.items, BENCH), np.arange(COUNT)

    base = load()
    monkeypatch.setattr(searching, "searched", search)
    monkeypatch.setattr(searching, "measured_over", measured_over)
    [found] = SUFFIX.run(base, SuffixSettings(items=3), TARGET, BENCH)
    assert (found.metric, found.of) == ("accuracy with a searched suffix", "accuracy")
    assert [len(questions) for questions in learned] == [3, 3]
    questions = QUESTIONS["question"].to_pylist()
    for question, prompt in zip(questions, asked, strict=True):
        assert prompt[: len(question)] == question
        assert question not in learned[int(prompt[-1])]
    assert {prompt[-1] for prompt in asked} == {"0", "1"}
    with pytest.raises(RecipeError, match=r"evaluate\.of: a suffix is found on some questions"):
        SUFFIX.run(base, SuffixSettings(), Target(TARGET.settings, QUESTIONS.slice(0, 1)), BENCH)


def test_answers_are_searched_for_where_an_evaluation_has_some(toy_recipe: dict[str, Any]) -> None:
    assert [pair.answer for pair in pairs_of(TARGET)][:3] == [" paris", " rome", " tokyo"]
    items = pa.table({"prompt": ["where?"], "reference": [["paris", "lutetia"]]})
    assert pairs_of(Target(LeakageSettings(), items)) == [Pair("where?", " paris")]
    with pytest.raises(RecipeError, match="has no answers to search for"):
        pairs_of(Target(PerplexitySettings(), pa.table({"text": ["a"]})))
    texts_only = {"kind": "audit", "of": "perplexity", "attack": "suffix"}
    with pytest.raises(RecipeError, match="a 'perplexity' evaluation has no prompts to change"):
        load_recipe({**toy_recipe, "evaluate": [*toy_recipe["evaluate"], texts_only]})
