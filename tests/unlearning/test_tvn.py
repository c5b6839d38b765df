"""TVN: what is subtracted is what was learned, whoever computes it."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import IGNORED, Samples, Text, collate, encode
from spunge.recipe.training import LoRA
from spunge.unlearning.method import Task
from spunge.unlearning.scored import scored
from spunge.unlearning.trained import training
from spunge.unlearning.tvn import TVN, TVNSettings
from spunge.weights.delta import LowRank
from toys import ARCHITECTURES, texts

FORGET = Samples(pa.table({"text": texts("forget", 10)}))


@pytest.mark.formula("tvn")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lora_change_equals_what_peft_merges(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    before = {name: tensor.clone() for name, tensor in base.parameters.items()}
    with training(base, LoRA(rank=4, alpha=6, targets="all-linear"), seed=1) as trained:
        with torch.no_grad():
            for parameter in trained.parameters:
                parameter.copy_(torch.randn_like(parameter))
        changes = trained.changes(1.0)
        merged = trained.model.merge_adapter()
        assert merged is None
        weights = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
            for name, parameter in trained.model.named_parameters()
            if "lora_" not in name
        }
        stored = {key: weights[name] for name, keys in base.names.items() for key in keys}
        for name, change in changes.items():
            assert isinstance(change, LowRank)
            torch.testing.assert_close(before[name] + change.dense(), stored[name], rtol=1e-4, atol=1e-4)
        unchanged = set(before) - set(changes)
        assert all(torch.equal(stored[name], before[name]) for name in unchanged)
        trained.model.unmerge_adapter()


@pytest.mark.formula("tvn")
def test_the_sign_is_carried_once_and_strength_scales_it(load: Callable[..., Any]) -> None:
    base = load()
    one, half = (
        TVN.unlearn(
            Task(base, {"a": FORGET}, None, {"a": 1}), TVNSettings(strength=strength, learning_rate=0.01)
        ).changes
        for strength in (1.0, 0.5)
    )
    name = next(iter(one))
    first, second = one[name], half[name]
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    torch.testing.assert_close(first.dense(), 2 * second.dense())
    assert first.scale == -1.0
    torch.testing.assert_close(first.dense(), -(16 / 16) * first.B @ first.A)


def test_forgetting_raises_the_forget_texts_loss(load: Callable[..., Any]) -> None:
    base = load()
    settings = TVNSettings(steps=20, learning_rate=2e-3, trainable={"kind": "all"})
    branch = TVN.unlearn(Task(base, {"a": FORGET}, None, {"a": 1}), settings)
    batch = collate([encode(text, base.tokenizer, 64) for text in FORGET.texts(range(10), base.tokenizer)])

    def loss() -> float:
        with torch.no_grad():
            logits = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return float(scored(logits, batch).losses().sum())

    before = loss()
    with torch.no_grad():
        for name, change in branch.changes.items():
            assert isinstance(change, torch.Tensor)
            base.parameters[name].add_(change)
    assert loss() > 1.005 * before


def test_the_loss_is_on_the_completion_alone(load: Callable[..., Any]) -> None:
    tokenizer = load().tokenizer
    coded = encode(Text("the capital of france is", " paris"), tokenizer, 64)
    assert [label for label in coded.labels if label != IGNORED] == tokenizer(" paris")["input_ids"]
    assert len(coded.ids) == 6
    cut = encode(Text("the capital of france is", " paris"), tokenizer, 3)
    assert tokenizer.decode(cut.ids) == "france is paris"
