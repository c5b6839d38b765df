"""Adapters of every kind that can be opened: peft's own `merge_and_unload`, from its own loading, is the oracle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import TaskArithmeticSettings
from spunge.weights.opening import open_source

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "tied": {**SMALL, "tie_word_embeddings": True},
    "biased": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False},
    "gpt_neox": {**SMALL, "num_key_value_heads": 4},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SMALL, **EXPERTS},
    "qwen3_moe": {**SMALL, **EXPERTS},
    "gpt_oss": {**SMALL, **EXPERTS, "layer_types": ["full_attention"] * 2},
    "gemma3": {"text_config": SMALL, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 62},
    "llama4": {
        "text_config": {**SMALL, **EXPERTS, "intermediate_size_mlp": 48, "pad_token_id": 0},
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
}  # fmt: skip
KINDS = {"tied": "llama", "biased": "llama"}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """base_of("gpt2") -> the folder of a random model, the same one each time; whole: another class to save than the causal
    language model's."""
    made: dict[str, Path] = {}

    def build(name: str, whole: str = "") -> Path:
        if name + whole not in made:
            config = transformers.AutoConfig.for_model(KINDS.get(name, name), **MODELS[name])
            torch.manual_seed(0)
            kind = getattr(transformers, whole) if whole else None
            model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            made[name + whole] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name + whole])
        return made[name + whole]

    return build


def loaded(folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def trained(base: Path, folder: Path, config: peft.PeftConfig, kind: str = "AutoModelForCausalLM", name: str = "default") -> Path:
    """An adapter with random factors, as peft saves it."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(loaded(base, kind), config, adapter_name=name)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder if name == "default" else folder / name


def merged(base: Path, adapter: Path, out: Path) -> list[str]:
    report = merge(base, [open_source(adapter, base)], TaskArithmeticSettings(), out)
    return report.notes


def assert_as_peft(base: Path, adapter: Path, out: Path, kind: str = "AutoModelForCausalLM") -> None:
    """Every tensor of the merged folder, as transformers loads it, is that of peft's own loading and merging."""
    merged(base, adapter, out)
    before = loaded(base, kind).state_dict()
    right = peft.PeftModel.from_pretrained(loaded(base, kind), adapter).merge_and_unload().state_dict()
    got = loaded(out, kind).state_dict()
    assert got.keys() == right.keys()
    assert any(not torch.allclose(before[name], right[name]) for name in right)
    for name, tensor in right.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "without some": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "by a regular expression": ("llama", {"target_modules": r".*\.1\..*(q|o)_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "bias of all": ("biased", {"bias": "all"}),
    "bias of the adapted": ("biased", {"bias": "lora_only"}),
    "bias of the factors": ("biased", {"lora_bias": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora on Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora with biases": ("biased", {"use_dora": True, "bias": "all"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a parameter": ("llama", {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
    "modules whole": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "a block's mlp whole": ("llama", {"modules_to_save": ["mlp"]}),
    "tied embeddings whole": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "some tokens": ("llama", {"trainable_token_indices": [3, 5]}),
    "some tokens of tied embeddings": ("tied", {"trainable_token_indices": [3, 5]}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D and linear": ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True}),
    "fused query, key and value": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "experts stored apart": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts stored apart, of qwen": ("qwen3_moe", {"target_parameters": ["experts.down_proj"]}),
    "experts in one tensor": (
        "gpt_oss",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LORA)
def test_a_lora_is_merged_as_peft_merges_it(base_of: Callable[..., Path], tmp_path: Path, name: str) -> None:
    model, values = LORA[name]
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **values})
    base = base_of(model)
    assert_as_peft(base, trained(base, tmp_path / "adapter", config), tmp_path / "out")


OTHERS = {
    "loha": peft.LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}),
    "lokr": peft.LoKrConfig(r=4, alpha=3, target_modules=["q_proj", "up_proj"], decompose_factor=4),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("model", ["llama", "biased"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_merged_as_peft_merges_them(
    base_of: Callable[..., Path], tmp_path: Path, name: str, model: str
) -> None:
    base = base_of(model)
    assert_as_peft(base, trained(base, tmp_path / "adapter", OTHERS[name]), tmp_path / "out")


def test_an_adapter_of_another_name_is_found_where_peft_saves_it(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    place = trained(base, tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]), name="second")
    assert_as_peft(base, place, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_lower_precision_are_read_as_they_are(
    base_of: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = base_of("llama")
    place = trained(base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    file = place / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items() if "base_layer" not in key}, file)
    assert_as_peft(base, place, tmp_path / "out")


@pytest.mark.parametrize("fan", [True, False])
def test_the_layer_and_not_the_file_says_which_way_round_it_lies(
    base_of: Callable[..., Path], tmp_path: Path, fan: bool
) -> None:
    base = base_of("gpt2")
    config = peft.LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    place = trained(base, tmp_path / "adapter", config)
    change_config(place, fan_in_fan_out=fan)
    assert_as_peft(base, place, tmp_path / "out")


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


TEXT = r".*language_model.*(q_proj|v_proj|down_proj)"
WRAPPERS = [
    ("gemma3", "", "AutoModelForCausalLM", TEXT),
    ("gemma3", "", "AutoModelForImageTextToText", ["q_proj", "v_proj"]),
    ("llama4", "Llama4ForConditionalGeneration", "AutoModelForCausalLM", ["q_proj", "v_proj"]),
    ("llama4", "Llama4ForConditionalGeneration", "Llama4ForConditionalGeneration", TEXT),
]


@pytest.mark.parametrize(("model", "whole", "kind", "targets"), WRAPPERS)
def test_an_adapter_of_any_class_of_a_vision_language_model_fits_its_base(
    base_of: Callable[..., Path], tmp_path: Path, model: str, whole: str, kind: str, targets: Any
) -> None:
    base = base_of(model, whole)
    place = trained(base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=targets), kind)
    assert_as_peft(base, place, tmp_path / "out", kind)


@pytest.mark.parametrize("model", ["gpt2", "bloom"])
def test_a_base_stored_without_the_models_prefix_takes_an_adapter(
    base_of: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    base = shutil.copytree(base_of(model), tmp_path / "published")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    targets = ["c_attn", "c_fc"] if model == "gpt2" else ["query_key_value"]
    assert_as_peft(base, trained(base, tmp_path / "a", peft.LoraConfig(r=4, target_modules=targets)), tmp_path / "out")
