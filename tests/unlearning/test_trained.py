"""What a LoRA learns on embeddings, heads, experts and odd layers: base + delta is the model that peft trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.model.loading import Base, load_base
from spunge.model.names import stored_names
from spunge.recipe.model import ModelSettings
from spunge.recipe.training import Everything, LoRA
from spunge.unlearning.trained import training
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta, write_delta
from spunge.weights.overlay import applied
from variety import MODELS, loaded


def base_in_memory(folder: Path, kind: str = "AutoModelForCausalLM") -> Base:
    model = loaded(folder, kind).requires_grad_(False)
    names, regions = stored_names(model, Checkpoint(folder))
    return Base(model, None, folder, torch.device("cpu"), torch.float32, names, 2, regions)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 13)[None] % 60).logits


def learned(base: Base, what: LoRA, out: Path) -> tuple[Tensor, Tensor]:
    """Logits of the trained model as peft has it, and of the base with the written delta."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with training(base, what, seed=1) as trained:
        torch.manual_seed(2)
        for parameter in trained.parameters:
            parameter.data += 0.05 * torch.randn_like(parameter)
        right = logits(trained.model.eval())
        changes = trained.changes(1.0)
    assert before.keys() == base.model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    write_delta(out, changes, {"base": Checkpoint(base.folder).fingerprint()})
    with applied(base.parameters, open_delta(out)):
        return right, logits(base.model)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LEARNS: dict[str, tuple[str, Any]] = {
    "embeddings": ("llama", ["embed_tokens", "q_proj"]),
    "the head": ("llama", ["lm_head", "q_proj"]),
    "Conv1D": ("gpt2", ["c_attn", "c_proj"]),
    "Conv1D and linear": ("gpt2", ["c_attn", "lm_head"]),
    "scaled embeddings": ("gemma3_text", ["embed_tokens"]),
    "experts stored one by one": ("mixtral", [*EXPERTS, "q_proj"]),
    "experts by their stored names": ("mixtral", ["w1", "w2"]),
    "experts stored one by one, of qwen": ("qwen3_moe", EXPERTS),
    "experts stored in one tensor": ("gpt_oss", EXPERTS),
    "experts stored in one tensor, of llama 4": ("llama4", [*EXPERTS, "shared_expert.down_proj"]),
    "experts and a shared one": ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"]),
    "experts and a dense block": ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"]),
    "a router that gives a tuple": ("llama4", ["router", "q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNS)
def test_base_and_delta_are_the_model_that_peft_trained(
    base_of: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model, targets = LEARNS[name]
    base = base_in_memory(base_of(model, {"llama4": "Llama4ForConditionalGeneration"}.get(model, "")))
    before = logits(base.model)
    right, got = learned(base, LoRA(rank=3, alpha=5, dropout=0.0, targets=targets), tmp_path / "delta")
    assert (right - before).abs().max() > 1e-3
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_what_is_adapted_by_default_is_learned_or_refused(
    base_of: Callable[..., Path], tmp_path: Path, model: str, targets: Any
) -> None:
    whole = {"llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}.get(model, "")
    base = base_in_memory(base_of(model, whole), whole or "AutoModelForCausalLM")
    what = LoRA(rank=3, alpha=5, dropout=0.0 if targets == "all-linear" else 0.01, targets=targets)
    right, got = learned(base, what, tmp_path / "delta")
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
    stored = open_delta(tmp_path / "delta").tensors
    assert not any("vision" in name or "visual" in name for name in stored)
    assert any("attn" in name or "attention" in name for name in stored)


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        ("tied", {"targets": ["embed_tokens"]}, r"targets: 'model.embed_tokens' shares its weight with 'lm_head'"),
        ("tied", {"targets": ["lm_head", "q_proj"]}, r"targets: 'lm_head' shares its weight with 'model.embed_tokens'"),
        ("bloom", {"targets": ["word_embeddings"]}, r"targets: .*word_embeddings' shares its weight with 'lm_head'"),
        ("mixtral", {"targets": ["experts.down_proj"], "dropout": 0.1}, r"dropout: 0.1: .*experts.down_proj.*to 0"),
        ("qwen2_moe", {"targets": ["q_pro"]}, r"targets: no layer is called 'q_pro'; did you mean 'q_proj'\?"),
    ],
)
def test_what_a_branch_could_not_hold_is_refused_before_training(
    base_of: Callable[..., Path], model: str, values: dict[str, Any], said: str
) -> None:
    base = base_in_memory(base_of(model))
    with (
        pytest.raises(RecipeError, match=rf"unlearn\.trainable\.{said}"),
        training(base, LoRA(**{"dropout": 0.0, **values}), seed=1),
    ):
        pass
    assert not hasattr(base.model, "peft_config")


def test_a_pass_without_gradient_takes_none_from_the_next_one(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama")
    base = load_base(folder, ModelSettings(path=str(folder), dtype="bfloat16"))
    ids = torch.arange(1, 13)[None]
    with training(base, Everything(kind="all"), seed=1) as trained:
        with base.autocast():  # which keeps the weights that it cast
            with torch.no_grad():
                base.model(ids)
            loss = base.model(ids).logits.float().square().mean()
        loss.backward()
        assert trained.parameters
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.parameters)


@pytest.mark.parametrize("start", ["own", "shared"])
def test_branches_begin_with_the_same_factors_where_they_share_them(start: Any, tiny: Callable[..., Path]) -> None:
    base, what = base_in_memory(tiny("llama")), LoRA(start=start, dropout=0.5)
    begun = []
    for seed in (1, 2):
        with training(base, what, seed, common=7) as trained:
            begun.append(([p.detach().clone() for p in trained.parameters], torch.rand(3)))
    (first, drawn), (second, drawn_next) = begun
    assert all(map(torch.equal, first, second)) == (start == "shared")
    assert not torch.equal(drawn, drawn_next)  # what is dropped out is each branch's own
    with training(base, what, 1, common=8) as trained:
        assert not all(map(torch.equal, first, trained.parameters)) or start == "own"
