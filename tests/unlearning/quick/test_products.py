"""Linear layers with factors beside them: gradients by finite differences, and dropout that draws as dropout does."""

import copy
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from spunge.unlearning.forms import FORMS
from spunge.unlearning.quick.products import multiplied, multiplied_at_once


def with_factors(layer: nn.Linear, rank: int, dropout: float = 0.0) -> Any:
    """peft's layer around a frozen one, its factors scaled by 1/2 and not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank / 2, lora_dropout=dropout, target_modules=["0"])
    around = nn.Sequential(layer)
    around.is_loaded_in_4bit = type(layer).__name__ == "Linear4bit"  # type: ignore[assignment]
    around.is_loaded_in_8bit = type(layer).__name__ == "Linear8bitLt"  # type: ignore[assignment]
    wrapped: Any = inject_adapter_in_model(config, around)[0]
    for factor in (wrapped.lora_A, wrapped.lora_B):
        nn.init.normal_(factor["default"].weight)
    return wrapped.train()


def learned(layer: Any, x: torch.Tensor, way: Any) -> list[torch.Tensor]:
    """What a layer gives for x by this way, under autocast where x is bfloat16, and the gradients of the sum of its squares."""
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        outs = way(given, [layer])
    assert outs is not None
    (outs[0].float() ** 2).sum().backward()
    factors = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
    return [outs[0].float(), given.grad.float(), *factors]


def test_layers_that_share_an_input_have_the_gradients_of_finite_differences() -> None:
    torch.manual_seed(0)
    layers = [
        with_factors(nn.Linear(4, 5), 2).double(),
        nn.Linear(4, 3).requires_grad_(False).double(),
        with_factors(nn.Linear(4, 6, bias=False), 3).double(),
    ]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    factors = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: tuple(multiplied(x, layers)), (x, *factors), fast_mode=True)
    for out, layer in zip(multiplied(x, layers), layers, strict=True):
        torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize("share", [0.01, 0.3])  # drawn by their distances, and as a mask
def test_dropout_drops_its_share_from_the_factors_input_and_from_nothing_else(share: float) -> None:
    torch.manual_seed(0)
    size = 64
    layer = with_factors(nn.Linear(size, size, bias=False), size, share)
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].weight.data = torch.eye(size)
    x = torch.ones(1000, size, requires_grad=True)
    base = x.detach() @ layer.base_layer.weight.t()
    kept = ((multiplied(x, [layer])[0] - base) * 2 * (1 - share)).round(decimals=3)  # scaled by alpha / r = 1/2
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    zeros = (kept == 0).float().flatten()
    entries = zeros.numel()
    assert abs(zeros.sum() - entries * share) < 4 * (entries * share * (1 - share)) ** 0.5
    beside = (zeros[1:] * zeros[:-1]).sum()  # independent of its neighbour
    assert abs(beside - entries * share**2) < 5 * (entries * share**2) ** 0.5

    (multiplied(x, [layer])[0] * 1.0).sum().backward()
    of_x = x.grad - layer.base_layer.weight.sum(0)
    dropped = of_x.abs() < 1e-4
    torch.testing.assert_close(of_x[~dropped], torch.full_like(of_x[~dropped], 0.5 / (1 - share)), rtol=1e-3, atol=0)
    of_down = layer.lora_A["default"].weight.grad * 2 * (1 - share)  # row by row the entries that were read
    torch.testing.assert_close(of_down, (~dropped).float().sum(0).expand(size, size), rtol=1e-3, atol=0)
    layer.eval()
    torch.testing.assert_close(multiplied(x, [layer])[0], layer.base_layer(x) + 0.5 * x)


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("one", [True, False])
def test_layers_that_read_one_input_see_what_one_drawing_leaves_where_the_form_is_so(
    monkeypatch: pytest.MonkeyPatch, share: float, one: bool
) -> None:
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], one_dropout=one))
    torch.manual_seed(0)
    size = 48
    layers = [with_factors(nn.Linear(size, size, bias=False), size, share).double() for _ in range(2)]
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.data = torch.eye(size, dtype=torch.float64)
    x = torch.randn(200, size, dtype=torch.float64, requires_grad=True)
    outs = multiplied(x, layers)
    seen = [2 * (1 - share) * (out - x @ layer.base_layer.weight.t()) for out, layer in zip(outs, layers, strict=True)]
    kept = [(each.abs() > 1e-9).double() for each in seen]
    assert torch.equal(kept[0], kept[1]) == one
    weights = [torch.randn_like(out) for out in outs]
    sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
    scale = 0.5 / (1 - share)
    expected = sum(
        weight @ layer.base_layer.weight + scale * mask * weight
        for weight, layer, mask in zip(weights, layers, kept, strict=True)
    )
    torch.testing.assert_close(x.grad, expected)
    for layer, weight, mask in zip(layers, weights, kept, strict=True):
        torch.testing.assert_close(layer.lora_A["default"].weight.grad, scale * weight.t() @ (mask * x.detach()))
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, scale * weight.t() @ (mask * x.detach()))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="spunge[quant]")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_packed_in_4_bits_are_multiplied_by_the_values_that_they_stand_for(dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    from spunge.weights.packed import unpacked

    torch.manual_seed(0)
    packed = Linear4bit(64, 48, compute_dtype=dtype, quant_type="nf4", compress_statistics=True, device="cpu")
    packed.load_state_dict({"weight": torch.randn(48, 64), "bias": torch.randn(48)})
    packed = packed.to(dtype).to("cpu").requires_grad_(False)
    packed.support_avx512bf16_for_cpu, packed.source_cls = False, nn.Linear
    layer = with_factors(packed, 4).float()
    packed.bias.data = packed.bias.data.to(dtype)
    plain = nn.Linear(64, 48).requires_grad_(False).to(dtype)
    plain.weight.data, plain.bias.data = unpacked(packed), packed.bias.data
    beside = copy.deepcopy(layer)  # peft's own way, its values those that the packed ones stand for
    beside.base_layer = plain
    x = torch.randn(2, 5, 64, dtype=dtype)
    results = []
    for each, way in ((layer, multiplied_at_once), (beside, lambda x, layers: [layers[0](x)])):
        results.append(learned(each, x, way))
    for quick, own in zip(*results, strict=True):
        apart = (quick - own).norm() / own.norm()
        assert apart < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="spunge[quant]")
@pytest.mark.parametrize("called", [False, True])  # before its first call a layer holds its scales elsewhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_packed_in_8_bits_give_what_bitsandbytes_gives_and_its_gradients(
    dtype: torch.dtype, called: bool
) -> None:
    from bitsandbytes.nn import Linear8bitLt

    def made() -> Any:
        torch.manual_seed(0)
        packed = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
        packed.load_state_dict({"weight": torch.randn(48, 64), "bias": torch.randn(48)})
        return with_factors(packed.to("cpu").requires_grad_(False), 4).float()

    x = torch.randn(2, 5, 64, dtype=dtype)
    results = []
    for way in (multiplied_at_once, lambda x, layers: [layers[0](x)]):
        layer = made()
        layer.base_layer.bias.data = layer.base_layer.bias.data.to(dtype)
        if called:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                layer(x)
        results.append(learned(layer, x, way))
    for quick, own in zip(*results, strict=True):
        apart = (quick - own).norm() / own.norm()
        assert apart < (1e-5 if dtype == torch.float32 else 0.02)
