"""A quantised checkpoint is told as one by its configuration and by its tensors; a plain one never is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.weights.checkpoint import WHOLE, Checkpoint
from spunge.weights.header import DTYPES
from spunge.weights.quantised import described, quantisation, refuse_quantised

# The tensors of one linear layer (64 in, 32 out) as each format's own library stores them: name -> dtype and shape.
FORMATS: dict[str, dict[str, tuple[str, list[int]]]] = {
    "GPTQ": {
        "qweight": ("I32", [8, 32]), "qzeros": ("I32", [1, 4]), "scales": ("F16", [1, 32]), "g_idx": ("I32", [64]),
    },
    "AWQ": {"qweight": ("I32", [64, 4]), "qzeros": ("I32", [1, 4]), "scales": ("F16", [1, 32])},
    "bitsandbytes, 8 bits": {"weight": ("I8", [32, 64]), "SCB": ("F32", [32]), "weight_format": ("U8", [])},
    "bitsandbytes, 4 bits": {
        "weight": ("U8", [1024, 1]), "weight.absmax": ("U8", [32]), "weight.quant_map": ("F32", [16]),
        "weight.nested_absmax": ("F32", [1]), "weight.quant_state.bitsandbytes__nf4": ("U8", [90]),
    },
    "fp8 in blocks": {"weight": ("F8_E4M3", [32, 64]), "weight_scale_inv": ("F32", [1, 1])},
    "fp8 of fbgemm": {"weight": ("F8_E4M3", [32, 64]), "weight_scale": ("F32", [32, 1])},
    "fp8 with exponents": {"weight": ("F8_E4M3", [32, 64]), "scale": ("F8_E8M0", [1, 1])},
    "compressed-tensors, packed": {
        "weight_packed": ("I32", [32, 8]), "weight_scale": ("BF16", [32, 1]), "weight_shape": ("I64", [2]),
    },
    "compressed-tensors, int8": {"weight": ("I8", [32, 64]), "weight_scale": ("BF16", [32, 1])},
    "NVFP4": {"weight": ("U8", [32, 32]), "weight_scale": ("F8_E4M3", [32, 4]), "weight_scale_2": ("F32", [])},
    "HQQ": {"W_q": ("U8", [16, 64]), "scale": ("F16", [32, 1]), "zero": ("F16", [32, 1]), "nbits": ("I32", [])},
    "quanto": {"weight._data": ("I8", [32, 64]), "weight._scale": ("F32", [32, 1])},
    "torchao": {"_weight_qdata": ("I8", [32, 64]), "_weight_scale": ("F32", [32, 1])},
    "AQLM": {"codes": ("I16", [32, 8, 1]), "codebooks": ("F16", [1, 256, 1, 8]), "scales": ("F16", [32, 1])},
    "VPTQ": {"indices": ("I32", [1, 32, 8]), "centroids.weight": ("F16", [1, 256])},
    "SpQR": {"dense_weights": ("I64", [64]), "row_offsets": ("I32", [33])},
    "EETQ": {"weight": ("I8", [64, 32]), "weight_scales": ("F16", [32])},
    "BitNet": {"weight": ("U8", [8, 64]), "weight_scale": ("BF16", [1])},
    "MLX": {"weight": ("U32", [32, 8]), "scales": ("BF16", [32, 1]), "biases": ("BF16", [32, 1])},
    "EXL2": {"q_weight": ("I32", [8, 32]), "q_scale": ("I32", [1, 4]), "q_invperm": ("I16", [64])},
    "fp8 with a scale of another name": {"weight": ("F8_E4M3", [32, 64]), "weight_s": ("F32", [1])},
    "fp8 with scales in fp8": {"weight": ("F8_E4M3", [32, 64]), "weight_scale": ("F8_E4M3", [32, 4])},
    "one bit each": {"weight": ("BOOL", [32, 64])},
    "integers alone": {"weight": ("I8", [32, 64])},
    "long integers alone": {"weight": ("I64", [32, 64])},
}  # fmt: skip
PLAIN: dict[str, dict[str, tuple[str, list[int]]]] = {
    "bfloat16": {"weight": ("BF16", [32, 64]), "bias": ("F32", [32])},
    "8-bit floats without a scale": {"weight": ("F8_E4M3", [32, 64]), "bias": ("F8_E5M2", [32])},
    "experts in 8-bit floats with biases": {"down_proj": ("F8_E4M3", [2, 8, 8]), "down_proj_bias": ("BF16", [2, 8])},
    "GPT-2's masks": {"weight": ("F32", [32, 64]), "bias": ("U8", [1, 1, 8, 8]), "masked_bias": ("F32", [])},
    "GPT-J's masks and scale": {"bias": ("U8", [1, 1, 8, 8]), "scale_attn": ("F32", [])},
    "positions": {"position_ids": ("I64", [1, 8]), "token_type_ids": ("I32", [1, 8]), "weight": ("F16", [8, 4])},
    "Swin's index beside a scale": {"relative_position_index": ("I64", [4, 4]), "logit_scale": ("F32", [2, 1, 1])},
    "experts by token": {"tid2eid": ("I32", [64, 2]), "e_score_correction_bias": ("F32", [4])},
    "truth values": {"weight": ("BF16", [8]), "mask": ("BOOL", [8])},
    "a trained scale": {"weight": ("BF16", [8]), "scale": ("BF16", [8]), "num_batches_tracked": ("I64", [])},
    "complex numbers": {"weight": ("C64", [4, 4])},
}  # fmt: skip
MXFP4 = {"gate_up_proj_blocks": ("U8", [2, 32, 2, 16]), "gate_up_proj_scales": ("U8", [2, 32, 2])}


def stored(folder: Path, layer: Mapping[str, tuple[str, list[int]]], config: Any = None) -> Checkpoint:
    """A folder with a norm and one layer, whose bytes are zero."""
    tensors = {
        "model.norm.weight": ("BF16", [4]),
        **{f"model.layers.0.up_proj.{key}": what for key, what in layer.items()},
    }
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPES[dtype].itemsize
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps(header).encode()
    (folder / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy"}))
    return Checkpoint(folder, "--model")


@pytest.mark.parametrize("kind", [*FORMATS, "MXFP4"])
def test_a_quantised_layer_is_told_by_its_tensors_where_the_configuration_says_nothing(
    tmp_path: Path, kind: str
) -> None:
    checkpoint = stored(tmp_path, FORMATS.get(kind, MXFP4))
    said = quantisation(checkpoint)
    assert said is not None
    if kind.startswith(("GPTQ", "AWQ", "bits", "fp8 in", "HQQ", "quanto", "torchao", "AQLM", "MXFP4")):
        assert kind in said.partition(", by")[0]
    with pytest.raises(RecipeError, match=r"^--model: .* is quantised \(.*give the unquantised model$") as caught:
        refuse_quantised(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_layer_is_not_taken_for_a_quantised_one(tmp_path: Path, kind: str) -> None:
    checkpoint = stored(tmp_path, PLAIN[kind])
    assert quantisation(checkpoint) is None
    refuse_quantised(checkpoint)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "a method of tomorrow"}, "a method of tomorrow"),
        ({"format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}, None),  # as trainers leave it
        ({}, None),
        (None, None),
    ],
)
def test_what_a_configuration_says_is_believed(tmp_path: Path, config: Any, said: str | None) -> None:
    assert described({"quantization_config": config}) == said
    assert described({"text_config": {"quantization_config": config}}) == said
    checkpoint = stored(tmp_path, PLAIN["bfloat16"], {"model_type": "toy", "quantization_config": config})
    assert quantisation(checkpoint) == (f"{said}, says its config.json" if said else None)


def test_an_adapter_is_told_by_its_tensors_alone(tmp_path: Path) -> None:
    """Trainers put the configuration of the 4-bit base, on which they trained it, beside an adapter."""
    config = {"model_type": "toy", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    stored(tmp_path, PLAIN["bfloat16"], config)
    assert quantisation(Checkpoint(tmp_path, "--model", WHOLE)) is None
    stored(tmp_path, FORMATS["integers alone"], config)
    assert quantisation(Checkpoint(tmp_path, "--model", WHOLE)) is not None
