"""Tiny random models of every language model that transformers knows: configurations made small, field by field."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 288
MOST = 8_000_000  # parameters of a model that counts as tiny


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_all("vocab_size text_vocab_size entity_vocab_size vocab_size_per_layer_input", VOCABULARY),
    **_all("hidden_size n_embd d_model embed_dim emb_dim dim word_embed_proj_dim embedding_size embedding_dim", 32),
    **_all("lru_width encoder_hidden_size attention_hidden_size decoder_hidden_size out_hidden_size", 32),
    **_all("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff shared_intermediate_size", 64),
    **_all("intermediate_size_mlp", 64),
    **_all("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size ffn_hidden_size", 32),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks depth", 2),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_all("num_key_value_heads kv_n_heads multi_query_group_num", 2),
    **_all("head_dim d_head attention_head_size global_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_all("linear_num_key_heads linear_num_value_heads linear_num_heads", 4),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_sequence_length", 128),
    **_all("num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts", 4),
    **_all("num_experts_per_tok moe_k moe_topk num_experts_per_token top_k_experts experts_per_token", 2),
    **_all("n_group topk_group n_shared_experts num_shared_experts num_expert_group", 1),
    **_all("q_lora_rank kv_lora_rank", 16),
    **_all("qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim", 8),
    **_all("sliding_window attention_window_size attention_chunk_size local_attention window_size", 64),
    **_all("hidden_dropout attention_dropout dropout resid_pdrop embd_pdrop activation_dropout", 0.0),
    **_all("hidden_dropout_prob attention_probs_dropout_prob embd_dropout emb_pdrop embd_pdrop classifier_dropout", 0.0),
    **_all("chunk_size mamba_chunk_size", 16),
    **_all("ssm_state_size mamba_d_state mamba_state_size mamba_num_heads mamba_head_dim", 8),
    **_all("n_groups mamba_n_groups mamba_ngroups", 1),
    **_all("image_size", 28),
    **_all("patch_size", 14),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_ZAMBA = {
    **_all("layer_types layers_block_type", ["mamba", "mamba", "hybrid", "mamba"]),
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "num_key_value_heads": 4,
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "chunk_size": 16,
    "num_mem_blocks": 1,
    "adapter_rank": 4,
}
# What a kind wants beside these sizes, or in their place.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {**_MAMBA, **_all("layer_types layers_block_type", ["mamba", "attention"])},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 16, "zero_expert_num": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
    },
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "zamba2": _ZAMBA,
    "gemma3n_text": {
        "num_hidden_layers": 15,
        "num_kv_shared_layers": 5,
        "laurel_rank": 4,
        "intermediate_size": [48] * 15,
    }
    | {"hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 15},
    "phi4_multimodal": {"num_hidden_layers": 3},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "qwen2_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}},
    "glm4v": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}},
}
# Tried in turn until the model gives logits: heads without groups, and depths that hold a layer of every kind.
ADJUSTED: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"num_hidden_layers": 8},
    {"num_hidden_layers": 8, "num_key_value_heads": 4},
]


def tiny_model(kind: str) -> Any:
    """A random model of a kind (`model_type`), whose logits are finite. Raises ValueError with why there is none."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    reasons: list[str] = []
    # Of a vision-language model the whole, as people have it, also where its language part has a class of its own.
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        for config in _configurations(CONFIG_MAPPING[kind], OWN.get(kind, {}), reasons):
            if type(config) not in auto._model_mapping:
                break
            torch.manual_seed(0)
            try:
                return _checked(auto, config)
            except Exception as error:
                reasons.append(_line(error))
    raise ValueError(reasons[0])


def _checked(auto: Any, config: Any) -> Any:
    """The model of a configuration. Raises ValueError where it is large, or gives no logits for every token."""
    import torch

    with torch.device("meta"):
        if (entries := auto.from_config(copy.deepcopy(config)).num_parameters()) > MOST:
            raise ValueError(f"it stays large: {entries / 1e6:.0f} M parameters")
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too, so that nothing is right by being one or zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if logits.shape[:2] != ids.shape or not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"for {ids.shape[1]} tokens it gives logits of the shape {list(logits.shape)}, or none that are finite"
        )
    return model


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _configurations(kind: Any, own: Mapping[str, Any], reasons: list[str]) -> Iterator[Any]:
    for adjusted in ADJUSTED:
        try:
            yield kind(**_small(kind, {**adjusted, **own}))
        except Exception as error:
            reasons.append(_line(error))


def _small(kind: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration class: every size that it has, small; those of its parts too."""
    from transformers import CONFIG_MAPPING

    usual = kind().to_dict()
    parts = {name: usual[name] for name in kind.sub_configs if isinstance(usual.get(name), dict)}
    values = {name: SIZES[name] for name in usual if name in SIZES and name not in parts}
    for name, part in parts.items():
        inner = CONFIG_MAPPING[part["model_type"]]().to_dict() if part.get("model_type") in CONFIG_MAPPING else part
        shared = {key: value for key, value in own.items() if key in inner and name == "text_config"}
        values[name] = {key: SIZES[key] for key in inner if key in SIZES} | shared | dict(own.get(name, {}))
        if part.get("model_type"):
            values[name]["model_type"] = part["model_type"]
    values |= {
        key: copy.deepcopy(value) for key, value in own.items() if key not in parts and (key in usual or not parts)
    }
    return values


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, after three special tokens: the kind that most architectures' own tokenizer classes take."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
