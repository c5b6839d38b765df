"""Text classifiers: probabilities against a plain forward pass, labels by name, weights that must be there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spunge.errors import RecipeError
from spunge.evaluation.scorers.classifiers import fingerprint_of, labels_of, load_classifier, scored_label
from toys import SMALL, texts

ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # far from uniform, so that errors show
}
LONG = " ".join(texts("long", 20))


@pytest.fixture
def classifier(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """classifier("bert", num_labels=3) -> the folder of a random classifier."""

    def build(architecture: str = "bert", seed: int = 0, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        shape = {**SMALL, "initializer_range": 0.5} if architecture == "llama" else ENCODER
        config = AutoConfig.for_model(architecture, **{**shape, **changes})
        folder = tmp_path / f"{architecture}-{seed}-{len(list(tmp_path.iterdir()))}"
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return build


def logits(folder: Path, text: str, length: int) -> torch.Tensor:
    """By transformers alone, one text, no padding; float32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:length]
    with torch.no_grad():
        found: torch.Tensor = (
            AutoModelForSequenceClassification.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0].double()
        )
    return found


@pytest.mark.parametrize(("architecture", "length"), [("bert", 40), ("roberta", 39), ("llama", 128)])
def test_probabilities_are_those_of_each_text_alone(
    classifier: Callable[..., Path], architecture: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = classifier(architecture, num_labels=3)
    given = [LONG, *texts("some", 7), "paris"]
    expected = np.stack([logits(folder, text, length).softmax(-1).numpy() for text in given])
    monkeypatch.setattr("spunge.evaluation.scorers.classifiers.TOKENS_PER_BATCH", 60)  # several batches, padded
    found = load_classifier(str(folder), None, "evaluate.scorer").probabilities(given)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert found.std(axis=0).min() > 0.01  # the texts differ, or the above would say little


@pytest.mark.parametrize(
    "changes", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each(
    classifier: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = classifier("bert", **changes)
    given = texts("some", 3)
    found = load_classifier(str(folder), None, "evaluate.scorer").probabilities(given)
    expected = np.stack([1 / (1 + np.exp(-logits(folder, text, 40).numpy())) for text in given])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_no_texts_have_no_probabilities(classifier: Callable[..., Path]) -> None:
    assert load_classifier(str(classifier()), None, "evaluate.scorer").probabilities([]).shape == (0, 2)


def test_a_decoder_without_a_padding_token_classifies_in_batches_too(classifier: Callable[..., Path]) -> None:
    folder = classifier("llama", num_labels=2, pad_token_id=None)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    given = texts("some", 4)
    judge = load_classifier(str(folder), None, "evaluate.scorer")
    assert judge.tokenizer.pad_token == "</s>"
    expected = np.stack([logits(folder, text, 128).softmax(-1).numpy() for text in given])
    np.testing.assert_allclose(judge.probabilities(given), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        (["LABEL_0", "LABEL_1"], 1),  # tomh/toxigen_roberta
        (["neutral", "toxic"], 1),  # s-nlp/roberta_toxicity_classifier
        (["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"], 0),  # unitary/toxic-bert
        (["nothate", "hate"], 1),  # facebook/roberta-hate-speech-dynabench-r4-target
        (["non-toxic", "Toxic"], 1),
        (["Hate Speech", "normal"], 0),
        (["score"], 0),
        (["NORMAL", "REJECTION"], 1),  # ProtectAI/distilroberta-base-rejection-v1
    ],
)
def test_the_scored_label_is_told_by_its_name(labels: list[str], index: int) -> None:
    assert scored_label(labels, None, "evaluate.label") == index


def test_labels_that_do_not_tell_are_listed() -> None:
    for labels in (["LABEL_0", "LABEL_1", "LABEL_2"], ["good", "bad"], ["hate", "offensive", "neither"]):
        with pytest.raises(RecipeError, match=f"^evaluate.label: .*{', '.join(labels)}$"):
            scored_label(labels, None, "evaluate.label")


def test_a_label_that_is_asked_for_goes_before_any_guess() -> None:
    assert scored_label(["toxic", "Threat"], "threat", "evaluate.label") == 1
    assert scored_label(["Bad", "bad"], "bad", "evaluate.label") == 1
    with pytest.raises(RecipeError, match="no label 'toxc'; did you mean 'toxic'"):
        scored_label(["neutral", "toxic"], "toxc", "evaluate.label")


@pytest.mark.parametrize("changes", [{"num_labels": 2}, {"num_labels": 3}, {"id2label": {0: "fine", 1: "toxic"}}])
def test_labels_in_the_configuration_are_those_of_the_loaded_model(
    classifier: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = classifier("bert", **changes)
    config = json.loads((folder / "config.json").read_text())
    assert labels_of(config) == load_classifier(str(folder), None, "evaluate.scorer").labels


def test_a_model_without_a_trained_head_is_refused(classifier: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"^evaluate.scorer: .* is a LlamaForCausalLM, no text classifier"):
        load_classifier(str(tiny("llama")), None, "evaluate.scorer")
    from safetensors.torch import load_file, save_file

    folder = classifier("bert")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RecipeError, match=r"lacks weights of a text classifier \(such as classifier.bias\)"):
        load_classifier(str(folder), None, "evaluate.scorer")


def test_a_missing_folder_or_hub_id_is_one_line_that_names_the_setting(tmp_path: Path) -> None:
    for path, match in [
        (str(tmp_path / "none"), "no folder"),
        ("nobody/no-such-classifier", "cannot be fetched from the Hub"),
        (str(tmp_path), "config.json in .* cannot be read"),
    ]:
        with pytest.raises(RecipeError, match=f"^evaluate.judge: .*{match}") as caught:
            load_classifier(path, None, "evaluate.judge")
        assert "\n" not in str(caught.value)


def test_pickled_weights_of_tensors_alone_are_read(classifier: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    folder = classifier("bert")
    expected = load_classifier(str(folder), None, "evaluate.scorer").probabilities(["paris"])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_classifier(str(folder), None, "evaluate.scorer").probabilities(["paris"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


class Intruder:
    """Unpickled without care, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickled_weights_that_would_run_code_are_refused(classifier: Callable[..., Path], tmp_path: Path) -> None:
    folder = classifier("bert")
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Intruder(tmp_path / "intruded")}, folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"^evaluate.scorer: .* cannot be loaded as a text classifier"):
        load_classifier(str(folder), None, "evaluate.scorer")
    assert not (tmp_path / "intruded").exists()


def test_a_fingerprint_tells_weights_apart_wherever_they_lie(classifier: Callable[..., Path]) -> None:
    first, same, other = classifier("bert"), classifier("bert"), classifier("bert", seed=1)
    assert fingerprint_of(str(first), None) == fingerprint_of(str(same), None)
    assert fingerprint_of(str(first), None) != fingerprint_of(str(other), None)
    for folder in (first, same, other):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fingerprint_of(str(first), None) == fingerprint_of(str(same), None) != fingerprint_of(str(other), None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"id2label": {"0": "fine", "1": "unsafe"}}),  # the labels the other way round
        ("tokenizer_config.json", {"model_max_length": 5}),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}),
    ],
)
def test_a_fingerprint_tells_apart_how_the_same_weights_are_read(
    classifier: Callable[..., Path], name: str, content: dict[str, Any]
) -> None:
    folder = classifier("bert")
    before = fingerprint_of(str(folder), None)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **content}))
    assert fingerprint_of(str(folder), None) != before


def test_the_fingerprint_of_a_hub_id_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--owner--name"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint_of("owner/name", None) == commit
    assert fingerprint_of("owner/name", "f" * 40) == "f" * 40
