"""Activations that are computed again: the same losses and the same delta, with less held."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from picked import few
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.loading import Base, load_base
from spunge.recipe.model import ModelSettings
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import Everything
from spunge.registry import METHODS
from spunge.unlearning.finetuning import teach
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.trained import training
from toys import ANSWERING, ANSWERING_BOTH, WORDS, texts

PLAIN = Samples(pa.table({"text": texts("a", 8)}))
KEPT = Samples(pa.table({"text": texts("other", 8)}))
PAIRS = Samples(
    pa.table({"prompt": texts("a", 8), "completion": [f" {text}" for text in texts("b", 8)], "refusal": texts("c", 8)})
)
LORA = {"kind": "lora", "rank": 4, "dropout": 0.2, "targets": "all-linear"}
EVERYTHING = {"kind": "all"}
ALIKE = {"satimp", "ce_u", "me_gd", "altpo"}  # which call the model as graddiff and dpo do
TRAINED = [
    *(
        (method, "llama", {"trainable": LORA})
        for method in sorted(set(METHODS.builtin) - {"precomputed", "quark", "demem", *ALIKE})
    ),
    ("quark", "llama", {"trainable": LORA, "scorer": {"kind": "keywords", "words": WORDS[::2]}, "labels": WORDS[:4]}),
    ("npo", "gpt2", {"trainable": EVERYTHING, "retain_loss": "kl"}),  # with dropout of its own
    ("npo", "gpt2", {"trainable": {"kind": "tensors", "match": ["*.h.2.mlp.*"]}, "reference": "stored"}),
    ("rmu", "llama", {"layer": 3}),
    ("rmu", "gpt2", {"trainable": EVERYTHING, "layer": 3}),
]


def trained(base: Any, method: str, log: Path, **changes: Any) -> Branch:
    settings = {"method": method, "steps": 2, "epochs": None, "batch_size": 4, "learning_rate": 1e-3, **changes}
    task = Task(
        base, {"a": PAIRS if method in ANSWERING else PLAIN}, PAIRS if method in ANSWERING_BOTH else KEPT, {"a": 1}, log
    )
    return METHODS.get(method).unlearn(task, METHODS.get(method).settings(**settings))


def told(log: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in log.open()]


@contextmanager
def held() -> Iterator[list[int]]:
    """Bytes of each tensor that is held for the backward pass, but for those that only a block's second computation holds."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(0 if tensor.is_leaf and tensor.requires_grad else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize(
    ("method", "architecture", "changes"), few(TRAINED, 0, 3, *range(len(TRAINED) - 4, len(TRAINED)))
)
def test_the_delta_and_the_losses_are_the_same_with_less_held(
    load: Callable[..., Any], tmp_path: Path, method: str, architecture: str, changes: dict[str, Any]
) -> None:
    base = load(architecture)
    with held() as whole:
        expected = trained(base, method, tmp_path / "held", **changes)
    with held() as inputs:
        again = trained(replace(base, checkpoint_activations=True), method, tmp_path / "again", **changes)
    assert again.changes.keys() == expected.changes.keys()
    for name, change in expected.changes.items():
        other = again.changes[name]
        if isinstance(change, torch.Tensor):
            assert torch.equal(other, change)
        else:
            assert torch.equal(other.A, change.A)
            assert torch.equal(other.B, change.B)
    assert told(tmp_path / "again") == told(tmp_path / "held")
    assert sum(inputs) < 0.75 * sum(whole)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())


def test_teaching_holds_less_and_teaches_the_same(load: Callable[..., Any]) -> None:
    base = load()
    settings = TeachSettings(source="rows.jsonl", steps=2, epochs=None, batch_size=4, learning_rate=1e-3)
    task = Task(base, {"": PLAIN}, None, {"": 1}, setting="teach")
    with held() as whole:
        expected = teach(task, settings)
    with held() as inputs:
        again = teach(replace(task, base=replace(base, checkpoint_activations=True)), settings)
    assert all(torch.equal(again.changes[name], change) for name, change in expected.changes.items())
    assert sum(inputs) < 0.75 * sum(whole)


def test_an_architecture_that_cannot_is_refused_before_training(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_neox_japanese", **small)
    model = AutoModelForCausalLM.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = Base(model, None, tmp_path, torch.device("cpu"), torch.float32, {name: (name,) for name in before}, 2)
    with (
        pytest.raises(RecipeError, match=r"model.checkpoint_activations: true: .* GPTNeoXJapaneseForCausalLM again"),
        training(replace(base, checkpoint_activations=True), Everything(), seed=1),
    ):
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_setting_reaches_the_base(tiny: Callable[..., Path]) -> None:
    settings = ModelSettings(path=str(tiny()), dtype="float32", checkpoint_activations=True)
    assert load_base(tiny(), settings).checkpoint_activations
    assert load_base(tiny(), settings, last=1).checkpoint_activations
