"""Tiny models in quantised formats, made by the formats' own arithmetic, with the values that they stand for."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from toys import SMALL

E2M1 = torch.tensor(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
)  # OCP microscaling formats, 5.3.3
SIZES = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def fp8_blocks(weight: Tensor, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit floats, a scale for each square block, and the values that they stand for, in bfloat16."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // size, size, columns // size, size)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    packed = (blocks / scale).to(torch.float8_e4m3fn)
    values = (packed.float() * scale).bfloat16().reshape(rows, columns)
    return packed.reshape(rows, columns), scale[:, 0, :, 0].contiguous(), values


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(experts, in, out) as pairs of 4-bit floats (experts, out, in / 32, 16), their exponents, and what they stand for."""
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = ((blocks / exponents.exp2())[..., None] - E2M1).abs().argmin(-1)
    values = (E2M1[codes] * exponents.exp2()).flatten(-2).transpose(1, 2).bfloat16().contiguous()
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (exponents[..., 0] + 127).to(torch.uint8), values


def model(kind: str, folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    extra: dict[str, Any] = {}
    if kind == "gpt_oss":
        extra = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
        extra["layer_types"] = ["full_attention", "sliding_attention"]
    if kind == "qwen3_moe":
        extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "dtype": torch.bfloat16, **extra})
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def quantise(folder: Path, out: Path, config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Write a model anew: the projections of a Llama as fp8, the experts of gpt-oss as MXFP4. Returns its values."""
    out.mkdir(parents=True)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    tensors = load_file(folder / "model.safetensors")
    stacked = any(name.endswith("experts.down_proj") for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], values[name] = mxfp4(tensor)
            said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
        elif name.endswith("_proj.weight") and not stacked:
            stored[name], stored[f"{name}_scale_inv"], values[name] = fp8_blocks(tensor)
            said = FP8
        else:
            stored[name] = values[name] = tensor
    for file in folder.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, "quantization_config": config or said}))
    return values


def gguf(folder: Path, out: Path) -> dict[str, Tensor]:
    """Write a Llama as a GGUF file whose projections are in Q8_0. Returns its values, in bfloat16."""
    import gguf as library
    import numpy as np

    out.mkdir(parents=True)
    writer = library.GGUFWriter(out / "model-Q8_0.gguf", "llama")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(SIZES["hidden_size"] // SIZES["num_attention_heads"])
    writer.add_vocab_size(SIZES["vocab_size"])
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    values: dict[str, Tensor] = {}
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float()
        count = next((count for module, count in heads.items() if module in name), None)
        if count is not None:  # llama.cpp keeps the halves of a rotation beside each other
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        key = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 1:
            writer.add_tensor(key, array.numpy())
            values[name] = tensor
            continue
        packed = library.quantize(array.numpy(), library.GGMLQuantizationType.Q8_0)
        writer.add_tensor(key, packed, raw_dtype=library.GGMLQuantizationType.Q8_0)
        back = torch.from_numpy(np.array(library.dequantize(packed, library.GGMLQuantizationType.Q8_0)))
        if count is not None:
            back = back.reshape(count, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        values[name] = back.bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
