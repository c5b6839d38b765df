"""Quantisation: rounding against hand and an outside construction; which weights; and that they come back bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.evaluation.attacks.quantisation import NF4, dequantised, linear_weights, rounded
from spunge.evaluation.audit import AUDIT, AuditSettings
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.perplexity import PerplexitySettings
from toys import ARCHITECTURES, texts

BITS = ("int8", "rtn4", "nf4")


def test_int8_rounds_each_row_to_127ths_of_its_greatest_weight() -> None:
    row = torch.tensor([[1.27, -0.014, 0.016, 0.635], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.1, 2.9, 0.9]])
    expected = torch.tensor([[1.27, -0.01, 0.02, 0.64], [0.0, 0.0, 0.0, 0.0], [-254.0, 2.0, 2.0, 0.0]])
    torch.testing.assert_close(dequantised(row, "int8"), expected, rtol=0, atol=1e-6)


def test_rtn4_rounds_groups_of_64_to_sevenths_of_the_greatest_weight() -> None:
    row = torch.zeros(1, 70)
    row[0, :4] = torch.tensor([0.7, -0.14, 0.16, 0.34])
    row[0, 64:67] = torch.tensor([-7.0, 3.4, 0.4])  # a last group of six has a scale of its own
    expected = torch.zeros(1, 70)
    expected[0, :4] = torch.tensor([0.7, -0.1, 0.2, 0.3])
    expected[0, 64:67] = torch.tensor([-7.0, 3.0, 0.0])
    torch.testing.assert_close(dequantised(row, "rtn4"), expected, rtol=0, atol=1e-6)


def test_nf4_levels_are_the_normal_quantiles_of_qlora() -> None:
    """Dettmers et al. 2023: 8 quantiles on the negative side, 9 on the positive one, zero shared, scaled to [-1, 1]."""
    stats = pytest.importorskip("scipy.stats")
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, negative, [0.0]]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


def test_nf4_takes_the_nearest_level() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 128)
    groups = weight.view(5, 2, 64)
    largest = groups.abs().amax(dim=2, keepdim=True)
    distance = (groups / largest).unsqueeze(-1) - torch.tensor(NF4)
    expected = torch.tensor(NF4)[distance.abs().argmin(dim=-1)] * largest
    torch.testing.assert_close(dequantised(weight, "nf4"), expected.view(5, 128))


def test_nf4_is_what_bitsandbytes_makes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(dequantised(weight, "nf4"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "levels"), [("int8", 127), ("rtn4", 7)])
def test_no_weight_moves_by_more_than_half_a_level(bits: str, levels: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    found = dequantised(weight, bits)
    bound = weight.abs().amax(dim=1, keepdim=True) / levels / 2
    assert ((found - weight).abs() <= bound * 1.0001).all()
    assert len(found[0].unique()) <= 2 * levels + 1
    assert (found != weight).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_rounded_and_put_back(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    before = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    with rounded(base, "rtn4"):
        changed = {name for name, value in base.model.named_parameters() if not torch.equal(value, before[name])}
        inside = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    untouched = ("embed", "wte", "wpe", "norm", "ln_", "lm_head", "bias")
    assert changed == {name for name in before if not any(word in name for word in untouched)}
    assert len(changed) == len(linear_weights(base.model))
    after = dict(base.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # A second look at one layer: its rows are output channels, also where the model stores (in, out).
    name = sorted(changed)[0]
    original, found = before[name], inside[name]
    if architecture == "gpt2":
        original, found = original.T, found.T
    assert torch.equal(found, dequantised(original, "rtn4"))


def test_stacked_experts_are_rounded(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from toys import SMALL

    config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=3, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    inside = sum(value.numel() for name, value in model.named_parameters() if ".layers." in name and "norm" not in name)
    assert sum(weight.numel() for weight in linear_weights(model)) >= inside * 0.98  # a router may be no linear layer
    experts = [value for name, value in model.named_parameters() if "experts" in name and value.ndim == 3]
    known = {weight.data_ptr() for weight in linear_weights(model)}
    assert all(value.data_ptr() in known for value in experts)


@pytest.mark.parametrize("bits", BITS)
def test_the_evaluation_is_measured_with_rounded_weights(load: Callable[..., Any], bits: str) -> None:
    base = load()
    items = pa.table({"text": texts("plain", 6)})
    before = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    bench = Bench("merged", "", Path(), Path(), settings_of={"plain": PerplexitySettings()})
    settings = AuditSettings.model_validate({"attack": {"kind": "quantise", "bits": bits}, "of": "plain"})
    [found] = AUDIT.measure(base, settings, items, bench)
    assert (found.metric, found.of) == (f"perplexity quantised to {bits}", "perplexity")
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
    with torch.no_grad():
        for name, value in base.model.named_parameters():
            if name.endswith("proj.weight"):
                value.copy_(dequantised(value, bits))
    expected = 0.0
    ids = base.tokenizer(texts("plain", 6)[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(base.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found.numerator[0] == pytest.approx(expected, rel=1e-5)


def test_weights_come_back_when_the_measurement_fails(load: Callable[..., Any]) -> None:
    base = load()
    before = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    with pytest.raises(RuntimeError, match="no"), rounded(base, "int8"):
        raise RuntimeError("no")
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
