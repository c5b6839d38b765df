"""Whether a checkpoint is quantised: told by its config.json, and by its tensors where that says nothing.

A quantised weight is stored as packed integers or 8-bit floats, with scales beside it. Neither can be averaged with
another model's, and a difference of them is none of weights. Kept in step with the formats that transformers loads.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.header import TensorInfo

# The end of a tensor's name -> the formats whose checkpoints have it; the first that fits names the format.
_ENDS = (
    (r"\.g_idx", "GPTQ"),
    (r"\.(qweight|qzeros)", "GPTQ or AWQ"),
    (r"\.(SCB|weight_format)", "bitsandbytes, 8 bits"),
    (r"\.(quant_state\.bitsandbytes__\w+|quant_map|nested_absmax|absmax)", "bitsandbytes, 4 bits"),
    (r"_blocks", "MXFP4"),
    (r"\.weight_packed", "compressed-tensors"),
    (r"\.weight_scale_inv", "fp8 in blocks"),
    (r"\.W_q", "HQQ"),
    (r"\._data|\.weight_qtype", "quanto"),
    (r"[._:]qdata", "torchao"),
    (r"\.(codes|codebooks)", "AQLM"),
    (r"\.(indices|centroids)\.weight", "VPTQ"),
)
# The last part of the name of what undoes a quantisation, beside or below a weight.
SCALE = re.compile(
    r"(scale|absmax|scb$|qzero|zero_point|quant_|qtype|codebook|centroid|bias_lut|w_q$|meta$)", re.IGNORECASE
)
BY_CONFIG = "says its config.json"
_BUFFERS = re.compile(r"(^|[._])(bias|masked_bias|mask|position_ids|token_type_ids|num_batches_tracked|index|ids)$")
_WEIGHT = re.compile(
    r"(^|[._])(weights?|qweight|qzeros|w_q|codes|_data|qdata|weight_packed|blocks|proj)$|^(indices|qidxs|trellis)$",
    re.IGNORECASE,
)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def quantisation(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint is quantised, in a few words; None where it is not."""
    if checkpoint.of is not None:  # an adapter's config.json is that of the base it was trained on
        return _of_tensors(checkpoint.tensors)
    said = described(read_config(checkpoint.folder, checkpoint.setting))
    return f"{said}, {BY_CONFIG}" if said else _of_tensors(checkpoint.tensors)


def refuse_quantised(checkpoint: Checkpoint, choice: str = "") -> None:
    """Raises RecipeError, with the checkpoint's setting, where it is quantised. `choice`: what else can be done."""
    how = quantisation(checkpoint)
    where = f"{checkpoint.setting}: {str(checkpoint.folder)!r}"
    if how is None:
        if info := next((info for info in checkpoint.tensors.values() if info.dtype == torch.float8_e8m0fnu), None):
            raise RecipeError(
                f"{where} stores {info.name!r} as float8_e8m0fnu, which holds powers of two alone: scales of quantised weights; "
                "give the unquantised model"
            )
        return
    if how.endswith(BY_CONFIG) and next(packed_weights(checkpoint.tensors), None) is None:
        raise RecipeError(
            f"{where} is quantised ({how}), but its tensors are plain numbers; if they are the model's own, take "
            "quantization_config out of config.json"
        )
    raise RecipeError(
        f"{where} is quantised ({how}), and packed numbers are no weights to train or to merge; give the unquantised model{choice}"
    )


def described(config: Mapping[str, Any]) -> str | None:
    """What a config.json says of quantisation, at its top or in a part of it."""
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        if isinstance(said, Mapping) and said and not _switched_off(said):
            bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
            method = str(said.get("quant_method") or ("bitsandbytes" if bits else said.get("format") or "unnamed"))
            return f"{method}, {bits} bits" if bits else method
    for part in config.values():
        if isinstance(part, Mapping) and (inner := described(part)):
            return inner
    return None


def settled(config: Any, folder: Path) -> Any:
    """transformers' configuration without quantisation settings that are empty or switched off, which it refuses to load."""
    if described(read_config(folder)) is None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _switched_off(said: Mapping[str, Any]) -> bool:
    """A configuration of bitsandbytes that asks for neither 4 nor 8 bits: transformers leaves it out of account."""
    if said.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    asked = [said[key] for key in ("load_in_4bit", "load_in_8bit") if key in said]
    return bool(asked) and not any(asked)


def _of_tensors(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The format, and the tensor that tells it."""
    packed = next(packed_weights(tensors), None)
    if packed is None:
        return None
    for ends, kind in _ENDS:
        pattern = re.compile(rf".*({ends})")
        if any(pattern.fullmatch(name) for name in tensors):
            return f"{kind}, by its tensor {packed.name!r}"
    dtype = str(packed.dtype).removeprefix("torch.")
    return f"its tensor {packed.name!r} is stored as {dtype}"


def packed_weights(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """The tensors that are quantised weights: integers by the name of a weight, or integers and 8-bit floats with a scale.

    8-bit floats without a scale are plain numbers, and integers of other names buffers: masks, positions, tables. Whatever
    is named after an 8-bit float (`weight_s` beside `weight`) is taken for its scale.
    """
    scaled: dict[str, list[TensorInfo]] = {}  # the module, or the weight itself, that a scale lies beside or below
    for info in tensors.values():
        module, _, last = info.name.rpartition(".")
        if SCALE.search(last):
            scaled.setdefault(module, []).append(info)
    named_after = _named_after(tensors)
    for info in tensors.values():
        module, _, last = info.name.rpartition(".")
        scales = [*scaled.get(module, ()), *scaled.get(info.name, ())]
        if info.dtype in EIGHT_BITS:
            wide = any(scale.dtype not in EIGHT_BITS for scale in scales)
            if not SCALE.search(last) and (wide or info.name in named_after):
                yield info
            continue
        if info.dtype.is_floating_point or info.dtype.is_complex:
            continue
        buffer = info.dtype in (torch.bool, torch.int64) or _BUFFERS.search(last)
        if _WEIGHT.search(last) or last.endswith("_blocks") or (scales and not buffer):
            yield info


def _named_after(names: Iterable[str]) -> set[str]:
    """What other tensors are named after: `a.weight` where there is `a.weight_s` or `a.weight.s`; biases do not count."""
    stems: set[str] = set()
    for name in names:
        module, _, last = name.rpartition(".")
        if not last.endswith("bias"):
            parts = last.split("_")
            stems.update(f"{module}.{'_'.join(parts[:count])}" for count in range(1, len(parts)))
            stems.add(module)
    return stems


def refuse_8_bits(checkpoint: Checkpoint) -> None:
    """Raises RecipeError, with the checkpoint's setting, for a base of 8-bit floats: a change is less than their steps."""
    stored = checkpoint.tensors.values()
    if info := next((info for info in stored if info.dtype.is_floating_point and info.dtype.itemsize == 1), None):
        dtype = str(info.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{checkpoint.setting}: {str(checkpoint.folder)!r} stores {info.name!r} as {dtype}, whose steps are too wide to train "
            "or merge into; load it in bfloat16 and save it again, with from_pretrained and save_pretrained"
        )
