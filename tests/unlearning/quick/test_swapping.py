"""The cheaper forms of layers give what transformers and peft give, and stand in for what they know alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from spunge.unlearning.forms import FORMS
from spunge.unlearning.quick.layers import gated, normed, normed_by_torch
from spunge.unlearning.quick.products import product_of
from spunge.unlearning.quick.swapping import quickened

ADAPTED = ("llama", "mistral", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt")


class Step(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]
    held: int  # bytes kept for the backward pass


def adapted(model: Any, dropout: float = 0.0) -> Any:
    """peft's wrapper of a model, with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return wrapped.train()


def step(model: Any, ids: Tensor) -> Step:
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    bfloat16 = next(model.parameters()).dtype == torch.bfloat16
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Step(loss.detach(), list(torch.autograd.grad(loss, trained)), sum(held.values()))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.arange(3, 63).reshape(3, 20)


def far(values: list[Tensor], exact: list[Tensor]) -> float:
    """The distance of all values together from the exact ones, as a share of their norm."""
    apart, norm = (
        torch.cat([each.double().flatten() for each in tensors])
        for tensors in ([a.double() - b for a, b in zip(values, exact, strict=True)], exact)
    )
    return float(apart.norm() / norm.norm())


@pytest.mark.parametrize("architecture", ADAPTED)
def test_losses_and_gradients_are_those_of_transformers_and_peft(
    load: Callable[..., Any], ids: Tensor, architecture: str
) -> None:
    model = adapted(load(architecture).model)
    plain = step(model.eval(), ids)  # without the architectures' own dropout
    with quickened(model):
        quick = step(model, ids)
    torch.testing.assert_close(quick.loss, plain.loss, rtol=1e-6, atol=0)
    assert far(quick.gradients, plain.gradients) < 1e-5
    assert quick.held < plain.held or architecture in ("gpt2",)  # whose layers are no nn.Linear
    assert not any("forward" in vars(module) for module in model.modules())


def test_in_bfloat16_gradients_are_as_near_to_the_exact_ones_as_pefts(load: Callable[..., Any], ids: Tensor) -> None:
    model = adapted(load("llama").model)
    exact = step(model, ids)
    model.bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    plain = step(model, ids)
    with quickened(model):
        quick = step(model, ids)
    assert all(gradient.dtype == torch.float32 for gradient in quick.gradients)
    assert far(quick.gradients, exact.gradients) < 1.1 * far(plain.gradients, exact.gradients)
    assert quick.held < 0.6 * plain.held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_whose_factors_are_off_or_zero_gives_the_same_bits(
    load: Callable[..., Any], ids: Tensor, dtype: torch.dtype
) -> None:
    base = load("llama").model.to(dtype)
    with torch.no_grad():
        expected = base(ids).logits
        model = adapted(base)
        with quickened(model):
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, expected)
            assert not torch.equal(model(ids).logits, expected)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
            assert torch.equal(model(ids).logits, expected)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_more_than_it_seems_is_left_alone(load: Callable[..., Any], ids: Tensor) -> None:
    model = load("llama").model
    block = model.model.layers[0]
    assert product_of(_Doubled(2, 2).requires_grad_(False)) is None
    assert product_of(nn.Linear(2, 2)) is None  # trained itself
    assert product_of(block.mlp.up_proj) is not None

    seen: list[Tensor] = []
    block.mlp.up_proj.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    block.mlp.act_fn = nn.GELU()
    block.input_layernorm.forward = lambda x: 0 * x
    with torch.no_grad(), quickened(model):
        expected = model(ids).logits
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
        assert torch.equal(model(ids).logits, expected)
    assert len(seen) == 3
    assert "forward" in vars(block.input_layernorm)


def test_a_gated_block_has_the_gradients_of_finite_differences() -> None:
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(a, b).double().requires_grad_(False) for a, b in ((4, 6), (4, 6), (6, 4)))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated(x, gate, up, down), x)


def test_a_norm_has_the_gradients_of_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    wide, factor = (each.detach().double().requires_grad_() for each in (x, weight))
    upstream = torch.randn(2, 3, 8)
    exact = factor * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = torch.autograd.grad(exact, (wide, factor), upstream.double())
    assert far(list(torch.autograd.grad(normed(x, weight, 1e-3), (x, weight), upstream)), list(expected)) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_factors_cast_at_each_call_give_the_same_bits_as_factors_cast_layer_by_layer(
    load: Callable[..., Any], ids: Tensor, dropout: float
) -> None:
    model = adapted(load("llama").model, dropout)
    model.bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    taken = []
    for at_once in (False, True):
        torch.manual_seed(0)
        with quickened(model, replace(FORMS["cpu"], cast_at_once=at_once)):
            taken.append(step(model, ids))
    assert torch.equal(taken[0].loss, taken[1].loss)
    for one, other in zip(taken[0].gradients, taken[1].gradients, strict=True):
        assert torch.equal(one, other)


def test_no_cast_factor_outlives_the_call_that_it_was_made_for(load: Callable[..., Any], ids: Tensor) -> None:
    model = adapted(load("llama").model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, layer.in_features)
    with quickened(model, replace(FORMS["cpu"], cast_at_once=True)):
        first = model(ids).logits
        between = layer(x)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()  # which torch's count of a tensor's versions does not tell
        assert torch.equal(layer(x), layer.base_layer(x))
        assert not torch.equal(layer(x), between)
        second = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, second)
            assert not torch.equal(first, second)


def test_a_factor_that_no_gradient_reaches_has_none_either_way(load: Callable[..., Any], ids: Tensor) -> None:
    model = adapted(load("llama").model)
    reached = {}
    for at_once in (False, True):
        with quickened(model, replace(FORMS["cpu"], cast_at_once=at_once)):
            states = model(ids, output_hidden_states=True).hidden_states[1]
        model.zero_grad()
        states.sum().backward()
        reached[at_once] = {name for name, each in model.named_parameters() if each.grad is not None}
    assert reached[True] == reached[False]
    assert 0 < len(reached[True]) < sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_by_torch_is_as_near_to_the_exact_one_as_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 64).to(dtype), torch.randn(64).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    ours = normed_by_torch(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert far([ours], [exact]) <= 1.1 * far([normed(x, weight, 1e-6)], [exact])
