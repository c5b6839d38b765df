"""Parts by a classifier and by labels in words: the labels are those of transformers' own pipelines and of the model's logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError
from spunge.evaluation.attributes import classifier, zero_shot
from spunge.recipe.loading import load_recipe
from toys import texts

ROWS = [*texts("rows", 11), " ".join(texts("long", 40))]
LABELS = ["river", "the moon"]


@pytest.fixture
def parts_of(write_rows: Callable[..., Path]) -> Callable[..., Parts]:
    def parts(by: dict[str, Any], **split: Any) -> Parts:
        forget = {"source": str(write_rows("rows.jsonl", [{"text": text} for text in ROWS]))}
        recipe = {"model": {"path": "m"}, "forget": forget, "split": {"by": by, **split}, "unlearn": {"method": "tvn"}}
        return split_rows(load_recipe(recipe))

    return parts


def members(parts: Parts) -> dict[str, set[str]]:
    return {part.value: set(part.samples.table["text"].to_pylist()) for part in parts.parts}


def expected_of(best: list[tuple[str, str, float]], threshold: float) -> dict[str, set[str]]:
    """Part -> texts, of (text, label, score)."""
    kept: dict[str, set[str]] = {}
    for text, label, score in best:
        if score >= threshold:
            kept.setdefault(label, set()).add(text)
    return kept


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_a_row_has_the_label_of_transformers_text_classification_pipeline(
    parts_of: Callable[..., Parts], tiny_bert: Path, threshold: float | None
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    model, tokenizer = (kind.from_pretrained(tiny_bert) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    told = pipeline("text-classification", model=model, tokenizer=tokenizer)(ROWS, truncation=True, max_length=512)
    expected = expected_of(
        [(text, each["label"], each["score"]) for text, each in zip(ROWS, told, strict=True)], threshold or 0
    )
    parts = parts_of({"classifier": str(tiny_bert), **({} if threshold is None else {"threshold": threshold})})
    assert members(parts) == expected
    assert parts.unassigned == len(ROWS) - sum(map(len, expected.values()))


def nli_scores(folder: Path, several: bool, contradiction: int, entailment: int) -> list[list[float]]:
    """(rows, labels) by the model's own logits of each pair."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    scores = []
    for text in ROWS:
        pairs = [(text, f"it is {label}") for label in LABELS]
        logits = torch.stack(
            [
                model(**tokenizer(*pair, return_tensors="pt", truncation="only_first", max_length=64)).logits[0]
                for pair in pairs
            ]
        ).detach()
        if several:
            scores.append(logits[:, [contradiction, entailment]].softmax(-1)[:, 1].tolist())
        else:
            scores.append(logits[:, entailment].softmax(-1).tolist())
    return scores


@pytest.mark.parametrize("several", [False, True])
def test_a_row_has_the_label_whose_entailment_the_model_scores_highest(
    parts_of: Callable[..., Parts], tiny_nli: Callable[..., Path], several: bool
) -> None:
    folder = tiny_nli("contradiction", "neutral", "entailment")
    scores = nli_scores(folder, several, 0, 2)
    rated = [(text, *pair) for text, row in zip(ROWS, scores, strict=True) for pair in zip(LABELS, row, strict=True)]
    if several:
        expected = expected_of(rated, 0.5)
    else:
        best = [max(rated[at : at + 2], key=lambda one: one[2]) for at in range(0, len(rated), 2)]
        expected = expected_of(best, 0)
    by = {"zero_shot": LABELS, "model": str(folder), "hypothesis": "it is {}", "several": several}
    assert members(parts_of(by)) == expected


def test_labels_are_made_once_whatever_the_threshold(
    parts_of: Callable[..., Parts],
    tiny_bert: Path,
    tiny_nli: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nli = {"zero_shot": LABELS, "model": str(tiny_nli("not_entailment", "entailment"))}
    kinds = [{"classifier": str(tiny_bert)}, nli]
    before = [members(parts_of(by)) for by in kinds]

    def never(*_: Any) -> None:
        raise AssertionError("the model is loaded again")

    for module in (classifier, zero_shot):
        monkeypatch.setattr(module, "load_classifier", never)
    assert [members(parts_of(by)) for by in kinds] == before
    sure = [parts_of({**by, "threshold": 0.7}, unassigned="keep") for by in kinds]
    assert [sum(part.rows for part in parts.parts) for parts in sure] == [len(ROWS)] * 2
    with pytest.raises(AssertionError, match="loaded again"):
        parts_of({**nli, "zero_shot": [*LABELS, "bread"]})


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ({"zero_shot": ["a", "b"]}, r"split.by.model: none of the labels of .* is entailment \(unsafe, fine\)"),
        ({"zero_shot": ["a"]}, "split.by.zero_shot"),
        ({"zero_shot": ["a", "a"]}, "split.by.zero_shot: 'a' stands twice"),
        ({"zero_shot": ["a", "b"], "hypothesis": "it is"}, "split.by.hypothesis: 'it is': {} must stand in it once"),
        ({"classifier": "nowhere"}, "split.by.classifier: 'nowhere' cannot be fetched from the Hub"),
    ],
)
def test_what_cannot_label_is_refused(
    parts_of: Callable[..., Parts], tiny_bert: Path, by: dict[str, Any], said: str
) -> None:
    model = {"model": str(tiny_bert)} if "zero_shot" in by else {}
    with pytest.raises(RecipeError, match=said):
        parts_of({**by, **model})


def test_a_model_that_generates_is_no_classifier(parts_of: Callable[..., Parts], tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"split.by.classifier: .* is a LlamaForCausalLM, no text classifier"):
        parts_of({"classifier": str(tiny("llama"))})
