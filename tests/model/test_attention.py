"""The attention that a base in bfloat16 on a CPU calls, against torch's sdpa in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spunge.model import attention
from spunge.model.loading import load_base
from spunge.recipe.schema import ModelSettings
from toys import ARCHITECTURES

NARROW = {"sliding_window": 5}


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes is tested on every CPU; it is used where bfloat16 products are in hardware."""
    monkeypatch.setattr(attention, "has_bfloat16_products", lambda: True)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length).clone()


def padded_right(length: int) -> Tensor:
    mask = causal(length)
    mask[1, :, :, length // 2 :] = False
    return mask


def padded_left(length: int) -> Tensor:
    mask = causal(length)
    mask[1, :, :, : length // 2] = False
    return mask


def sliding(length: int) -> Tensor:
    return padded_right(length) & torch.ones(length, length, dtype=torch.bool).triu(-9)


def sees_ahead(length: int) -> Tensor:
    mask = causal(length)
    mask[..., : length // 3] = True
    return mask


def through_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3
    )
    return found.transpose(1, 2)


@pytest.mark.parametrize("shared", [1, 2, 6])  # keys of 6 heads
@pytest.mark.parametrize("length", [2, 20, 64, 70, 200])
@pytest.mark.parametrize("kind", [None, padded_right, padded_left, sliding, sees_ahead])
def test_outputs_and_gradients_are_sdpas_up_to_rounding(
    kind: Callable[[int], Tensor] | None, length: int, shared: int
) -> None:
    torch.manual_seed(0)
    states = [torch.randn(2, length, heads, 16).bfloat16().transpose(1, 2) for heads in (6, shared, shared)]
    mask = None if kind is None else kind(length)
    # What a query that sees nothing gives is nobody's business.
    looks = torch.ones(2, length, 1, 1) if mask is None else mask.any(dim=-1).transpose(1, 2).unsqueeze(-1).float()
    above = torch.randn(2, length, 6, 16).bfloat16() * looks.bfloat16()

    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [each.to(dtype).requires_grad_() for each in states]
        out = call(*inputs, mask) * looks.to(dtype)
        return [out, *torch.autograd.grad(out, inputs, above.to(dtype))]

    exact = run(through_sdpa, torch.float32)
    ours = run(lambda *inputs: attention.attention(None, *inputs, scaling=0.3)[0], torch.bfloat16)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm() + 1e-6


def in_bfloat16(tiny: Callable[..., Path], architecture: str, **changes: Any) -> Any:
    folder = tiny(architecture, **changes)
    return load_base(folder, ModelSettings(path=str(folder), dtype="bfloat16", device="cpu"))


def outcome(base: Any, name: str, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Logits at the tokens of a padded batch, and the embeddings' gradient, with the named attention."""
    base.model.config._attn_implementation = name
    ids = torch.arange(3, 123).view(2, 60) % 128
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    weight = base.model.get_input_embeddings().weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() * mask.unsqueeze(-1)
    (gradient,) = torch.autograd.grad(logits.square().sum(), weight)
    return logits.detach(), gradient.float()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((architecture, {}) for architecture in ARCHITECTURES), ("mistral", NARROW), ("phi3", NARROW)],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_architecture_uses_it_and_gives_what_it_gave(
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    changes: dict[str, Any],
    autocast: bool,
) -> None:
    base, calls = in_bfloat16(tiny, architecture, **changes), []
    monkeypatch.setattr(attention, "_spans", lambda *given, call=attention._spans: calls.append(1) or call(*given))
    assert base.model.config._attn_implementation == attention.NAME
    if autocast:
        base.model.float()  # as in training all tensors, which are float32 then
    for found, wanted in zip(outcome(base, attention.NAME, autocast), outcome(base, "sdpa", autocast), strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert len(calls) == 4  # one a block


def test_what_is_out_of_the_ordinary_is_left_to_sdpa(tiny: Callable[..., Path]) -> None:
    """Dropout in the attention, and a cache of earlier keys."""
    base = in_bfloat16(tiny, "gpt2", attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)
    logits = {}
    for name in (attention.NAME, "sdpa"):
        torch.manual_seed(0)
        base.model.train()
        logits[name] = outcome(base, name)[0]
    assert torch.equal(logits[attention.NAME], logits["sdpa"])
    base.model.eval()
    base.model.config._attn_implementation = attention.NAME
    written = base.model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, do_sample=False)
    assert written.shape[1] <= 12


def test_float32_and_other_devices_keep_sdpa(load: Callable[..., Any]) -> None:
    model = load("llama").model
    attention.speed_up(model, torch.device("cpu"), torch.float32)
    attention.speed_up(model, torch.device("cuda"), torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_told_to_use_another_attention_keeps_it(load: Callable[..., Any]) -> None:
    model = load("llama").model
    model.set_attn_implementation("eager")
    attention.speed_up(model, torch.device("cpu"), torch.bfloat16)
    assert model.config._attn_implementation == "eager"


def test_a_cpu_without_bfloat16_products_keeps_sdpa(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_bfloat16_products", lambda: False)
    model = load("llama").model
    attention.speed_up(model, torch.device("cpu"), torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
