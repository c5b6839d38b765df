"""Fluency: the judge's own loss on each completion, one text at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation import fluency
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.fluency import FLUENCY, FluencySettings
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.evaluation.statistics import score
from spunge.model.loading import Base
from spunge.recipe.loading import load_recipe
from toys import texts

PROMPTS = ["the capital of france is", "one two three", "dog", *texts("prompts", 6)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("base", "the model", tmp_path / "base", tmp_path / "base")


@pytest.fixture
def judge(tiny: Callable[..., Path]) -> Path:
    """Another model than the judged one, with large weights: its losses differ much from text to text."""
    return tiny("gpt2", initializer_range=0.3)


def settings_for(judge: Path, **changes: Any) -> FluencySettings:
    return FluencySettings(**{"judge": str(judge), "judge_dtype": "float32", **changes})


def own_loss(judge: Path, prompt: str, completion: str) -> tuple[float, int]:
    """transformers' own loss of a completion with the prompt masked, one text; the tiny tokenizer joins no two words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForCausalLM.from_pretrained(judge).eval()
    ids = tokenizer(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
    count = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * count, count


def say(monkeypatch: pytest.MonkeyPatch, written: list[list[str]]) -> None:
    monkeypatch.setattr(fluency, "completions", lambda base, prompts, settings, bench: written)


def test_it_is_the_exponent_of_the_judges_own_loss(
    load: Callable[..., Base], judge: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [[f" {text}"] for text in texts("completions", len(PROMPTS))]
    say(monkeypatch, written)
    [measure] = FLUENCY.measure(load(), settings_for(judge), pa.table({"prompt": PROMPTS}), bench)
    expected = [own_loss(judge, prompt, text.strip()) for prompt, [text] in zip(PROMPTS, written, strict=True)]
    assert measure.metric == "completion perplexity"
    assert measure.higher == "bad"
    assert measure.denominator.tolist() == [count for _, count in expected]
    assert measure.numerator == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert np.std(measure.numerator / measure.denominator) > 0.1  # the texts differ, or the above would say little
    total, count = (sum(column) for column in zip(*expected, strict=True))
    assert score([measure], range(len(PROMPTS))).value == pytest.approx(np.exp(total / count), rel=1e-4)


def test_several_samples_of_a_prompt_add_up(
    load: Callable[..., Base], judge: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [[" red dog", "", " sleeps in the old city"], ["", "", ""]])
    table = pa.table({"prompt": PROMPTS[:2]})
    [measure] = FLUENCY.measure(load(), settings_for(judge), table, bench)
    expected = [own_loss(judge, PROMPTS[0], text) for text in ("red dog", "sleeps in the old city")]
    assert measure.denominator.tolist() == [sum(count for _, count in expected), 0]
    assert measure.numerator == pytest.approx([sum(loss for loss, _ in expected), 0], rel=1e-4)


def test_nothing_but_empty_completions_has_no_perplexity(
    load: Callable[..., Base], judge: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [[""], [""]])
    [measure] = FLUENCY.measure(load(), settings_for(judge), pa.table({"prompt": PROMPTS[:2]}), bench)
    assert measure.denominator.tolist() == [0, 0]


def test_it_judges_what_the_model_writes_and_keeps_it_for_others(
    load: Callable[..., Base], judge: Path, bench: Bench
) -> None:
    base, generation = load(), GenerationSettings(max_new_tokens=6)
    written = completions(base, PROMPTS, generation, bench)
    files = sorted(bench.folder.glob("texts-*.jsonl"))
    [measure] = FLUENCY.measure(base, settings_for(judge, generation=generation), pa.table({"prompt": PROMPTS}), bench)
    assert sorted(bench.folder.glob("texts-*.jsonl")) == files  # taken from there, not written again
    said = np.array([bool(text) for [text] in written])
    assert (measure.denominator > 0).tolist() == said.tolist()
    assert said.any()


def test_the_answer_to_a_chat_message_begins_on_a_line_of_its_own(
    load: Callable[..., Base], judge: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [["paris"]])
    table = pa.table({"prompt": PROMPTS[:1]})
    # Without the line break the tiny tokenizer would read the one unknown word `isparis`.
    [measure] = FLUENCY.measure(load(), settings_for(judge, generation={"chat": True}), table, bench)
    loss, count = own_loss(judge, PROMPTS[0], "paris")
    assert measure.denominator.tolist() == [count] == [1]
    assert measure.numerator == pytest.approx([loss], rel=1e-4)


def test_the_judge_is_loaded_once_for_all_stages(
    load: Callable[..., Base], judge: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [[" paris"]])
    loaded = []
    real = fluency.load_base
    monkeypatch.setattr(fluency, "load_base", lambda *given, **named: loaded.append(given) or real(*given, **named))
    base, table = load(), pa.table({"prompt": PROMPTS[:1]})
    for stage in ("base", "merged"):
        FLUENCY.measure(base, settings_for(judge), table, replace(bench, stage=stage))
    FLUENCY.measure(base, settings_for(judge, max_length=64), table, bench)
    assert len(loaded) == 1


def test_a_judge_that_is_not_there_is_named(load: Callable[..., Base], bench: Bench, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["dog"]})
    generation = GenerationSettings(max_new_tokens=1)
    with pytest.raises(RecipeError, match=r"^evaluate.judge: no folder"):
        FLUENCY.measure(load(), settings_for(tmp_path / "none", generation=generation), table, bench)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(RecipeError, match=r"^evaluate.judge: .* convert them to safetensors$"):
        FLUENCY.measure(load(), settings_for(tmp_path / "pickled", generation=generation), table, bench)
    with pytest.raises(RecipeError, match=r"judge"):
        load_recipe({"model": "x", "forget": {"source": "x"}, "unlearn": "rmu", "evaluate": [{"kind": "fluency"}]})


def test_the_instrument_is_the_judges_weights(judge: Path) -> None:
    instrument = FLUENCY.instrument(settings_for(judge))
    assert instrument.pop("generation")["max_new_tokens"] == settings_for(judge).generation.max_new_tokens
    assert instrument == {
        "judge": str(judge),
        "revision": fingerprint_of(str(judge), None),
    }


@pytest.mark.thorough
def test_a_real_judge_finds_sense_likelier_than_its_words_in_another_order(
    load: Callable[..., Base], real_model: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, found = pa.table({"prompt": ["The capital of France is"]}), []
    base, settings = load(), settings_for(real_model)
    for text in (" Paris, a city on the river Seine.", " Seine river, the a city on Paris."):
        say(monkeypatch, [[text]])
        [measure] = FLUENCY.measure(base, settings, table, bench)
        found.append(score([measure], [0]).value)
    assert found[0] < 30 < found[1]
