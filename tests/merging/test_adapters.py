"""Adapters that a merge writes: peft loads each over its base, and the logits are those of base + merged change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from making import noise, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.adapters import factored
from spunge.merging.command import Merged, merge_command, summary
from variety import MODELS, loaded

RANK = 3
JAMBA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
WHOLE = {"llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}
VISION = ("vision", "visual", "projector")


def kind_of(name: str) -> str:
    return WHOLE.get(name, "AutoModelForCausalLM")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 13)[None] % 60).logits


def changed(base: Path, out: Path, ends: tuple[str, ...] = ("",)) -> Path:
    """A model whose matrices differ from the base's by something of rank RANK, in tensors whose names end so."""
    tensors = load_file(base / "model.safetensors")
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.ndim >= 2 and name.endswith(ends) and not any(word in name for word in VISION):
            rows, columns = tensor.shape[-2:]
            left, right = (
                noise(number, *tensor.shape[:-2], rows, RANK),
                noise(-1 - number, *tensor.shape[:-2], RANK, columns),
            )
            tensors[name] = tensor + 0.05 * left @ right
    shutil.copytree(base, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def as_adapter(base: Path, model: Path, out: Path, rank: int = RANK) -> Merged:
    return merge_command(out, str(base), [str(model)], rule="task_arithmetic", as_adapter=rank)


def assert_applied(base: Path, model: Path, adapter: Path, kind: str) -> None:
    before, right = logits(loaded(base, kind)), logits(loaded(model, kind))
    assert (right - before).abs().max() > 0.01
    wrapped = peft.PeftModel.from_pretrained(loaded(base, kind), adapter).eval()
    torch.testing.assert_close(logits(wrapped), right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_every_matrix_gives_the_merged_models_logits(
    base_of: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = base_of(name, {**WHOLE, "llama4": "Llama4ForConditionalGeneration"}.get(name, ""))
    model = changed(base, tmp_path / "model")
    # A mixture's gate and up projections lie in one parameter, whose change has the rank of both.
    made = as_adapter(base, model, tmp_path / "adapter", 2 * RANK)
    assert all(fit.residual < 1e-4 for fit in made.fits)
    assert_applied(base, model, tmp_path / "adapter", kind_of(name))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_layers_have_the_models_names_where_the_base_is_stored_without_its_prefix(
    base_of: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = shutil.copytree(base_of(name), tmp_path / "published")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    model = changed(base, tmp_path / "model", ("c_attn.weight", "query_key_value.weight"))
    as_adapter(base, model, tmp_path / "adapter")
    assert all(key.startswith("base_model.model.transformer.h.") for key in load_file(tmp_path / "adapter" / FILE))
    assert_applied(base, model, tmp_path / "adapter", "AutoModelForCausalLM")


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize(("name", "layer"), [("llama", "embed_tokens"), ("llama", "lm_head"), ("tied", "embed_tokens")])
def test_embeddings_and_output_layers_are_adapted(
    base_of: Callable[..., Path], tmp_path: Path, name: str, layer: str
) -> None:
    model = changed(base_of(name), tmp_path / "model", (f"{layer}.weight",))
    as_adapter(base_of(name), model, tmp_path / "adapter")
    assert_applied(base_of(name), model, tmp_path / "adapter", "AutoModelForCausalLM")


def test_its_settings_are_those_that_peft_writes(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    as_adapter(base, changed(base, tmp_path / "model", ("q_proj.weight",)), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    wrapped = peft.get_peft_model(loaded(base), peft.LoraConfig(r=RANK, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "own")
    own = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert written.keys() == own.keys()
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (RANK, RANK, base.name)
    assert load_file(tmp_path / "adapter" / FILE).keys() == load_file(tmp_path / "own" / FILE).keys()


def test_an_adapter_that_loses_the_merge_says_so(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    made = as_adapter(base, changed(base, tmp_path / "model"), tmp_path / "adapter", 1)
    assert "loses much of this merge" in "\n".join(summary(made))


def test_what_is_no_matrix_is_told_as_lost(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    model = changed(base, tmp_path / "model", ("q_proj.weight",))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    lost = {fit.name: round(fit.residual, 3) for fit in as_adapter(base, model, tmp_path / "adapter").fits}
    assert lost.pop("model.norm.weight") == 1
    assert lost == {f"model.layers.{layer}.self_attn.q_proj.weight": 0 for layer in range(2)}


def test_a_base_that_transformers_does_not_know_has_no_adapter(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    model = write_checkpoint(tmp_path / "model", weights(seed=3))
    with pytest.raises(RecipeError, match=r"--as-adapter: transformers builds no model of "):
        as_adapter(base, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_factors_are_the_best_of_their_rank() -> None:
    delta = noise(0, 60, 40)
    a, b, residual = factored(delta, 10)
    best = torch.linalg.svdvals(delta)[10:].norm() / delta.norm()
    assert (a.shape, b.shape) == ((10, 40), (60, 10))
    assert residual == pytest.approx(float(best), rel=0.02)


def test_a_table_beside_a_blocks_layers_is_told_as_lost_and_the_rest_is_applied(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = transformers.JambaConfig(**JAMBA)
    torch.manual_seed(0)
    transformers.JambaForCausalLM(config).save_pretrained(base)
    model = changed(base, tmp_path / "model", ("in_proj.weight", "A_log", "q_proj.weight"))
    fits = {fit.name: fit.residual for fit in as_adapter(base, model, tmp_path / "out", 4).fits}
    changes = [name for name in fits if name.endswith(".weight")]
    assert [name for name in fits if fits[name] == 1] == ["model.layers.0.mamba.A_log"]
    got = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "out").merge_and_unload().state_dict()
    right = loaded(model).state_dict()
    for name in changes:
        torch.testing.assert_close(got[name], right[name], atol=1e-4, rtol=1e-4)


def test_a_layer_that_peft_adapts_in_no_mamba_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = changed(tmp_path / "base", tmp_path / "model", ("out_proj.weight",))
    with pytest.raises(RecipeError, match=r"^--as-adapter: .*'out_proj'.*--as-delta"):
        as_adapter(tmp_path / "base", model, tmp_path / "out")
