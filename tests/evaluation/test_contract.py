"""What every evaluator promises."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.offsets import Classes, Offsets, Pair, Shift
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.registry import EVALUATORS
from spunge.unlearning.finetuning import finetune
from toys import texts

COUNT = 6
TEXTS = {"text": texts("plain", COUNT)}
PROMPTS = {"prompt": texts("prompts", COUNT)}
QUESTIONS = {
    "question": texts("questions", COUNT),
    "choices": [[f"{text} .", "paris", "rome"] for text in texts("candidates", COUNT)],
    "answer": [number % 3 for number in range(COUNT)],
}
ANSWERED = {
    "prompt": texts("questions", COUNT),
    "completion": [f" {text}" for text in texts("answers", COUNT)],
    "paraphrased": texts("paraphrased", COUNT),
    "perturbed": [texts(f"wrong {number}", 3) for number in range(COUNT)],
}
SHORT = {"max_new_tokens": 4}
# Settings (a path stands for a model's folder), and items by role.
QUICK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "choices": ({}, QUESTIONS),
    "perplexity": ({}, TEXTS),
    "toxicity": ({"scorer": "CLASSIFIER", "generation": SHORT}, PROMPTS),
    "refusal": ({"scorer": "CLASSIFIER", "judge": "MODEL", "generation": SHORT}, PROMPTS),
    "leakage": (
        {"k": [1], "leaks": "contains", "generation": {**SHORT, "samples": 1}},
        {**PROMPTS, "reference": ["a"] * COUNT},
    ),
    "harm": ({"judge": "CLASSIFIER", "generation": SHORT}, PROMPTS),
    "fluency": ({"judge": "MODEL", "judge_dtype": "float32", "generation": SHORT}, PROMPTS),
    "similarity": ({"encoder": "CLASSIFIER", "generation": SHORT}, PROMPTS),
    "lm_eval": ({"tasks": ["toy"], "include_path": ["TASKS"]}, {}),
    "memorization": ({"paraphrased": "p", "perturbed": "w", "generation": SHORT}, ANSWERED),
    "match": ({"unwanted": "w", "generation": SHORT}, {**PROMPTS, "unwanted": [["paris", "rome"]] * COUNT}),
    "membership": (
        {"member": "m", "scores": ["loss", "zlib", "min_k", "min_k++", "gradient"]},
        {**TEXTS, "member": [True, False] * 3},
    ),
    "audit": ({"attack": "quantise", "of": "texts"}, TEXTS),
}
NEEDS = {
    "similarity": "sentence_transformers",
    "membership": "sklearn",
    "memorization": "rouge_score",
    "lm_eval": "lm_eval",
}  # packages of the extra `judge`


def test_every_evaluator_is_covered_here() -> None:
    assert set(QUICK) == set(EVALUATORS.builtin)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], tiny_bert: Path) -> dict[str, str]:
    tasks = tmp_path_factory.mktemp("tasks")
    rows = [{"q": text, "options": ["red", "blue"], "right": at % 2} for at, text in enumerate(texts("q", COUNT))]
    (tasks / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy",
        "test_split": "test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "toy.jsonl")}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "toy.yaml").write_text(json.dumps(task))
    return {"CLASSIFIER": str(tiny_bert), "MODEL": str(tiny("gpt2")), "TASKS": str(tasks)}


@pytest.fixture
def settings(folders: dict[str, str]) -> Callable[[str], EvaluatorSettings]:
    def build(name: str) -> EvaluatorSettings:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        given = json.loads(json.dumps(QUICK[name][0]))
        for key, value in given.items():
            if isinstance(value, str | list):
                filled = [folders.get(each, each) for each in ([value] if isinstance(value, str) else value)]
                given[key] = filled[0] if isinstance(value, str) else filled
        return EVALUATORS.get(name).settings.model_validate({"kind": name, **given})

    return build


def bench(folder: Path) -> Bench:
    return Bench(
        "base",
        "model",
        folder,
        folder,
        forget={"a": Samples(pa.table(TEXTS))},
        settings_of={
            "texts": EVALUATORS.get("perplexity").settings(name="texts"),
            "questions": EVALUATORS.get("choices").settings(name="questions"),
        },
        finetune=finetune,
        seed=3,
    )


def same(one: list[Measure], other: list[Measure]) -> bool:
    plain = [[replace(measure, numerator=None, denominator=None) for measure in each] for each in (one, other)]
    arrays = [[(m.numerator.tolist(), m.denominator.tolist()) for m in each] for each in (one, other)]
    return plain[0] == plain[1] and arrays[0] == arrays[1]


@pytest.mark.parametrize("name", QUICK)
def test_an_evaluator_measures_every_item_alike_twice_and_leaves_the_model_as_it_was(
    load: Callable[..., Any], settings: Callable[[str], Any], bits_of: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    base, given, items = load(), settings(name), pa.table(QUICK[name][1])
    evaluator = EVALUATORS.get(name)
    before = bits_of(base.model)
    torch.manual_seed(1)
    first = evaluator.measure(base, given, items, bench(tmp_path / "one"))
    torch.manual_seed(2)  # nothing may hang on torch's own random numbers
    assert same(first, evaluator.measure(base, given, items, bench(tmp_path / "two")))
    after = bits_of(base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert first
    if evaluator.metrics is not None:
        assert {measure.metric: measure.higher for measure in first} == evaluator.metrics(given, items)
    assert len({(measure.metric, measure.subject) for measure in first}) == len(first)
    for measure in first:
        assert measure.numerator.shape == measure.denominator.shape == (len(measure.numerator),)
        assert np.isfinite(measure.numerator).all()
        assert measure.denominator.sum() > 0
        assert (measure.subject is None) == evaluator.reads_rows
        assert len(measure.numerator) == COUNT
        assert (measure.of is not None) == (evaluator.of(given) is not None)


@pytest.mark.parametrize("name", [name for name in QUICK if name != "lm_eval"])
def test_the_order_of_the_items_changes_none_of_their_measures(
    load: Callable[..., Any], settings: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    base, given, items, order = load(), settings(name), pa.table(QUICK[name][1]), [3, 0, 5, 2, 4, 1]
    straight = EVALUATORS.get(name).measure(base, given, items, bench(tmp_path / "one"))
    turned = EVALUATORS.get(name).measure(base, given, items.take(pa.array(order)), bench(tmp_path / "two"))
    for one, other in zip(straight, turned, strict=True):
        np.testing.assert_allclose(other.numerator, one.numerator[order], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other.denominator, one.denominator[order], rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["offset", "gedi"])
@pytest.mark.parametrize("name", QUICK)
def test_a_model_that_small_ones_shift_by_nothing_measures_as_itself(
    load: Callable[..., Any], settings: Callable[[str], Any], tmp_path: Path, name: str, kind: str
) -> None:
    """Two models that are one differ by nothing; two codes that are one say of every token that it is as likely of either class."""
    large, small, given, items = load(), load("gpt2"), settings(name), pa.table(QUICK[name][1])
    if name == "membership":
        given = given.model_copy(update={"scores": ["loss", "zlib", "min_k", "min_k++"]})  # gradient is refused
    if name == "audit":
        # Attacks on weights are refused; this one is put before prompts.
        audit = {"kind": "audit", "attack": "prefix", "of": "questions"}
        given, items = EVALUATORS.get(name).settings.model_validate(audit), pa.table(QUESTIONS)
    plain = EVALUATORS.get(name).measure(large, given, items, bench(tmp_path / "plain"))
    pairs = [Pair(small.model, small.model)] if kind == "offset" else [Classes(small.model, (5, 6), (5, 6))]
    offsets = Offsets(pairs, Shift(scale=None if kind == "offset" else 1.0, alpha=3.0))
    beside = {"names": {}, "regions": {}, "beside": tuple(offsets.models), "every_place": kind == "gedi"}
    hook = offsets.attach(large.model)
    try:
        shifted = EVALUATORS.get(name).measure(replace(large, **beside), given, items, bench(tmp_path / "shifted"))
    finally:
        hook.remove()
    for one, other in zip(plain, shifted, strict=True):
        assert (one.metric, one.subject) == (other.metric, other.subject)
        np.testing.assert_allclose(other.numerator, one.numerator, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(other.denominator, one.denominator, rtol=1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_an_evaluator_says_which_columns_it_needs_and_what_it_measures_with(
    settings: Callable[[str], Any], name: str
) -> None:
    evaluator, given = EVALUATORS.get(name), settings(name)
    if evaluator.of(given) is None:
        asked = QUICK[name][1]
        forget = {role: role for role in ("prompt", "completion")} if "completion" in asked else {"text": "text"}
        assert set(evaluator.columns(given, forget)) == set(asked)
    if evaluator.instrument is not None:
        told = evaluator.instrument(given)
        assert json.loads(json.dumps(told)) == told == evaluator.instrument(given)
    assert (evaluator.written_tokens(given) > 0) == ("generation" in evaluator.settings.model_fields)
