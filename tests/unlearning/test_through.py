"""Training a small model through a larger one's logits (decode.through: sum), as delta-unlearning does."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from picked import few
from spunge.data.samples import Samples
from spunge.model.loading import Through
from spunge.registry import METHODS
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Branch, Task
from toys import ANSWERING, ANSWERING_BOTH, texts

THROUGH = [name for name in METHODS.builtin if METHODS.get(name).through]
WAYS = {"lora": {"kind": "lora", "rank": 2, "dropout": 0.0}, "all": {"kind": "all"}}


def samples(topic: str, answers: bool) -> Samples:
    if not answers:
        return Samples(pa.table({"text": texts(topic, 4)}))
    told = {"completion": [f" {text}" for text in texts(f"{topic}, answers", 4)], "refusal": texts("others", 4)}
    return Samples(pa.table({"prompt": texts(topic, 4), **told}))


def unlearned(base: Any, method: str, **changes: Any) -> Branch:
    settings = {"method": method, "steps": 3, "batch_size": 4, "learning_rate": 0.003, "max_damage": None, **changes}
    parts, retain = {"a": samples("a", method in ANSWERING)}, samples("other", method in ANSWERING_BOTH)
    return METHODS.get(method).unlearn(Task(base, parts, retain, {"a": 1}), METHODS.get(method).settings(**settings))


@pytest.mark.parametrize("way", few(list(WAYS), 0))
@pytest.mark.parametrize("method", few(THROUGH, THROUGH.index("npo"), THROUGH.index("undial")))
def test_through_the_small_model_itself_the_sum_is_the_small_model(
    load: Callable[..., Any], method: str, way: str
) -> None:
    """large + 1 * (own - small) is own where the large model is the small one: both trainings are one."""
    changes = {"trainable": WAYS[way]} | ({"answers": 2} if method == "llmu" else {})
    if "retain_loss" in METHODS.get(method).settings.model_fields and method not in {"ce_u", "pdu", "idk_ap"}:
        changes["retain_loss"] = "kl"
    base = load("llama")
    alone = unlearned(base, method, **changes)
    through = unlearned(replace(base, through=Through(copy.deepcopy(base.model), 1.0)), method, **changes)
    assert alone.losses == pytest.approx(through.losses, rel=1e-4, abs=1e-5)
    for name, change in alone.changes.items():
        one, other = (each if isinstance(each, Tensor) else each.dense() for each in (change, through.changes[name]))
        assert float((one - other).abs().max()) < 0.05 * float(one.abs().max()) + 1e-7


@pytest.mark.parametrize("method", ["ga", "npo"])
def test_the_loss_and_its_gradient_are_those_of_the_shifted_large_models_logits(
    load: Callable[..., Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """By transformers alone: large + 0.7 * (own - small), of a large model with a padded vocabulary."""
    base, large = load("llama"), AutoModelForCausalLM.from_pretrained(tiny("gpt2", n_embd=48, vocab_size=136)).eval()
    small, seen = copy.deepcopy(base.model), {}
    for parameter in large.parameters():
        parameter.requires_grad_(False)

    def run(loop: Loop) -> History:
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter += 0.1 * torch.randn_like(parameter)
        base.model.eval()
        loop.pieces = 1
        batch = loop.streams[0].batch(range(4))
        loss = loop.next_loss(0)
        seen["loss"] = float(loss.total.detach())
        loss.total.backward()
        names = [name for name, each in base.model.named_parameters() if each.requires_grad]
        seen["slopes"] = {name: base.model.get_parameter(name).grad.clone() for name in names}
        base.model.zero_grad()
        own = {"input_ids": batch.ids, "attention_mask": batch.mask}
        shift = 0.7 * (base.model(**own).logits - small(**own).logits)
        plain = large(**own).logits
        logits = torch.cat([plain[..., :128] + shift, plain[..., 128:]], dim=-1)

        def nll(logits: Tensor) -> Tensor:
            logs = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
            return -(logs * batch.mask[:, 1:])

        if method == "ga":
            expected = -nll(logits).sum() / batch.mask[:, 1:].sum()
        else:
            gap = nll(logits).sum(1) - nll(plain).sum(1)
            expected = (-2 / 0.1 * torch.nn.functional.logsigmoid(0.1 * gap)).mean()
        expected.backward()
        seen["expected"] = float(expected.detach())
        seen["theirs"] = {name: base.model.get_parameter(name).grad.clone() for name in names}
        base.model.zero_grad()
        return History(1, {}, None, {})

    monkeypatch.setattr(Loop, "run", run)
    beside = {"alpha": 0.0, "beta": 0.1} if method == "npo" else {}
    unlearned(replace(base, through=Through(large, 0.7)), method, trainable={"kind": "all"}, **beside)
    assert seen["loss"] == pytest.approx(seen["expected"], rel=1e-4)
    for name, slope in seen["slopes"].items():
        torch.testing.assert_close(slope, seen["theirs"][name], rtol=1e-3, atol=1e-5)
    assert any(float(slope.abs().max()) > 1e-3 for slope in seen["slopes"].values())
    assert all(parameter.grad is None for parameter in large.parameters())
