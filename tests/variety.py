"""Tiny random models of the architectures whose tensors' names, shapes or ties are out of the ordinary."""

from pathlib import Path
from typing import Any

import torch

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
    "qwen2_moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "deepseek_v3": {
        **{key: value for key, value in SMALL.items() if key != "head_dim"},
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {**SMALL, **EXPERTS, "layer_types": ["full_attention"] * 2},
    "gemma3_text": SMALL,
    "gemma3": {"text_config": SMALL, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 62},
    "llava": {"text_config": {**SMALL, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"}},
    "qwen2_vl": {
        "text_config": {**SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
    },
    "llama4": {
        "text_config": {**SMALL, **EXPERTS, "intermediate_size_mlp": 48, "pad_token_id": 0},
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
}  # fmt: skip
KINDS = {"tied": "llama", "biased": "llama"}


def build(name: str, folder: Path, whole: str = "") -> Path:
    """Save a random model; whole: another class of transformers than the causal language model's."""
    import transformers

    config = transformers.AutoConfig.for_model(KINDS.get(name, name), **MODELS[name])
    torch.manual_seed(0)
    kind = getattr(transformers, whole)._from_config if whole else transformers.AutoModelForCausalLM.from_config
    model = kind(config)
    for parameter in model.parameters():  # biases and norms too: nothing is right by being zero or one
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """As everyone loads it, in float32."""
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
