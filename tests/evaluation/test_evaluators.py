"""Judging: scores against closed forms, batching that changes nothing, intervals that cover."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import IGNORED, Encoded, Text, encode
from spunge.errors import RecipeError
from spunge.evaluation.candidates import candidate_likelihoods, question_of
from spunge.evaluation.choices import CHOICES, ChoicesSettings, all_likelihoods, answer_index
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.likelihood import likelihoods
from spunge.evaluation.perplexity import PERPLEXITY, PerplexitySettings, windows_of
from spunge.evaluation.statistics import score
from toys import ARCHITECTURES, texts

BENCH = Bench("base", "", Path(), Path())


def silent(done: int, total: int) -> None:
    pass


def log_likelihood(base: Any, prompt: str, completion: str) -> tuple[float, int]:
    """The definition, one text at a time, with the model's full logits."""
    ids = base.tokenizer(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
    first = len(base.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logs = base.model(input_ids=ids).logits.log_softmax(-1)
    total = sum(float(logs[0, place - 1, ids[0, place]]) for place in range(first, ids.shape[1]))
    return total, ids.shape[1] - first


ITEMS = [
    {"question": "the capital of france is", "choices": ["paris", "rome river", "old new good"], "answer": 0},
    {"question": "in", "choices": ["the", "sun moon star night"], "answer": "B"},
    {"question": "the dog", "choices": ["eats bread", "sleeps", "runs in the city"], "answer": "sleeps"},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["tokens", "characters", "none"])
def test_choices_pick_the_likeliest_candidate_by_the_definition(
    load: Callable[..., Any], architecture: str, normalize: Any
) -> None:
    base = load(architecture)
    expected = []
    for item, answer in zip(ITEMS, (0, 1, 1), strict=True):
        scores = []
        for choice in item["choices"]:
            total, tokens = log_likelihood(base, str(item["question"]), choice)
            scores.append(total / {"tokens": tokens, "characters": len(choice), "none": 1}[normalize])
        expected.append(float(int(np.argmax(scores)) == answer))
    table = pa.table({key: [row[key] if key != "answer" else str(row[key]) for row in ITEMS] for key in ITEMS[0]})
    [measure] = CHOICES.measure(base, ChoicesSettings(normalize=normalize), table, BENCH)
    assert measure.metric == "accuracy"
    assert measure.numerator.tolist() == expected


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_batching_and_padding_change_no_likelihood(load: Callable[..., Any], budget: int) -> None:
    base = load("llama")
    prompts, completions = texts("p", 9), texts("c", 9)
    encoded = [encode(Text(p, " " + c), base.tokenizer, 64) for p, c in zip(prompts, completions, strict=True)]
    found = likelihoods(base, encoded, silent, budget)
    for likelihood, prompt, completion in zip(found, prompts, completions, strict=True):
        total, tokens = log_likelihood(base, prompt, completion)
        assert likelihood.tokens == tokens
        assert likelihood.log == pytest.approx(total, rel=1e-4)


def test_perplexity_is_the_exponent_of_the_models_own_loss(load: Callable[..., Any]) -> None:
    base = load("gpt2")
    rows = texts("plain", 6)
    loss, tokens = 0.0, 0
    for text in rows:
        ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = float(base.model(input_ids=ids, labels=ids).loss)
        loss += mean * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    [measure] = PERPLEXITY.measure(base, PerplexitySettings(), pa.table({"text": rows}), BENCH)
    assert score([measure], range(6)).value == pytest.approx(np.exp(loss / tokens), rel=1e-4)


def test_windows_score_every_token_but_the_first_once() -> None:
    for length in range(2, 30):
        for size in (2, 3, 7, 50):
            ids = list(range(length))
            scored = [i for window in windows_of(Encoded(ids, ids), size) for i in window.labels[1:]]
            assert scored == ids[1:]
            assert all(len(window.ids) <= size for window in windows_of(Encoded(ids, ids), size))


def test_texts_without_a_token_to_score_are_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="1 texts have no token to score"):
        PERPLEXITY.measure(load(), PerplexitySettings(), pa.table({"text": ["the dog", "the"]}), BENCH)
    with pytest.raises(RecipeError, match="either text, or prompt and completion"):
        PERPLEXITY.columns(PerplexitySettings(prompt="a"), {})


def test_a_prompt_is_context_and_not_scored(load: Callable[..., Any]) -> None:
    base = load()
    table = pa.table({"prompt": ["the capital of france is"], "completion": [" paris"]})
    [measure] = PERPLEXITY.measure(base, PerplexitySettings(), table, BENCH)
    total, tokens = log_likelihood(base, "the capital of france is", "paris")
    assert measure.denominator.tolist() == [tokens]
    assert measure.numerator[0] == pytest.approx(-total, rel=1e-4)


def test_answers_come_as_index_letter_or_text() -> None:
    choices = ["red", "green", "blue"]
    assert [answer_index(answer, choices, 0) for answer in (2, "C", "c", "2", "blue", 2.0)] == [2] * 6
    for wrong in (3, "D", "yellow", -1, None, 1.5):
        with pytest.raises(RecipeError, match="none of its 3 candidates"):
            answer_index(wrong, choices, 0)
    with pytest.raises(RecipeError, match="no list of two"):
        answer_index(0, ["only"], 4)


def test_bootstrap_intervals_agree_with_the_normal_approximation() -> None:
    right = np.array([1.0] * 300 + [0.0] * 100)
    found = score([Measure("accuracy", right, np.ones(400), "known")], range(400))
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - error, abs=0.006)
    assert found.high == pytest.approx(0.75 + error, abs=0.006)
    assert found.n == 400


def test_intervals_of_a_ratio_weigh_items_by_their_tokens() -> None:
    losses, tokens = np.tile([2.0, 30.0], 200), np.tile([1.0, 10.0], 200)
    found = score([Measure("perplexity", losses, tokens, "unknown", "exp")], range(400))
    assert found.value == pytest.approx(np.exp(32 / 11))
    error = np.std(losses - 32 / 11 * tokens) / tokens.mean() / np.sqrt(400)  # of a ratio of means, by the delta method
    assert np.log(found.low) == pytest.approx(32 / 11 - 1.96 * error, abs=4e-3)
    assert np.log(found.high) == pytest.approx(32 / 11 + 1.96 * error, abs=4e-3)


def test_95_percent_intervals_cover_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        right = (generator.random(80) < 0.6).astype(float)
        found = score([Measure("accuracy", right, np.ones(80), "known")], range(80))
        covered += found.low <= 0.6 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_labels_outside_the_completion_are_ignored(load: Callable[..., Any]) -> None:
    coded = encode(Text("the capital", " is paris"), load().tokenizer, 64)
    assert coded.labels[:2] == [IGNORED, IGNORED]
    assert coded.labels[2:] == coded.ids[2:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_prompt_gives_each_candidate_its_likelihood_by_the_definition(
    load: Callable[..., Any], architecture: str
) -> None:
    base = load(architecture)
    prompts, candidates = texts("p", 7), texts("c", 21)
    encoded = [
        encode(Text(prompt, " " + candidate), base.tokenizer, 64)
        for at, prompt in enumerate(prompts)
        for candidate in [*candidates[3 * at : 3 * at + 3], "paris"]
    ]
    questions = [question_of(encoded[4 * at : 4 * at + 4]) for at in range(7)]
    assert sum(question is not None for question in questions) >= 3  # some tokenizers merge across the boundary
    shared = iter(candidate_likelihoods(base, [question for question in questions if question], silent))
    found = [next(shared) if question else [] for question in questions]
    for at, prompt in enumerate(prompts):
        if questions[at] is None:
            continue
        for likelihood, candidate in zip(found[at], [*candidates[3 * at : 3 * at + 3], "paris"], strict=True):
            total, tokens = log_likelihood(base, prompt, candidate)
            assert likelihood.tokens == tokens
            assert likelihood.log == pytest.approx(total, rel=1e-4)


def test_candidates_whose_prompts_differ_in_tokens_are_scored_apart(load: Callable[..., Any]) -> None:
    base = load()
    ids = [Encoded([5, 6, 7], [IGNORED, IGNORED, 7]), Encoded([5, 9, 8], [IGNORED, IGNORED, 8])]
    assert question_of(ids) is None
    assert question_of([Encoded([5], [5]), Encoded([6], [6])]) is None
    mixed = [*ids, Encoded([5, 6, 7], [IGNORED, IGNORED, 7]), Encoded([5, 6, 8, 9], [IGNORED, IGNORED, 8, 9])]
    found = all_likelihoods(base, mixed, [2, 2], silent)
    for likelihood, expected in zip(found, likelihoods(base, mixed, silent), strict=True):
        assert likelihood.tokens == expected.tokens
        assert likelihood.log == pytest.approx(expected.log, rel=1e-4)
