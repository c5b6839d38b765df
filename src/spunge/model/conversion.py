"""A model whose weights are pickled or quantised, written once more as plain safetensors by transformers itself.

What transformers can undo on a CPU is undone where the user asks for it (`model.dequantize`, `spunge merge --dequantize`):
fp8 in blocks as DeepSeek and Qwen publish it, MXFP4 as gpt-oss does, GGUF, and, where their libraries are installed,
compressed-tensors and bitsandbytes. The whole model is in memory meanwhile: transformers undoes a format on the model it loads,
not tensor by tensor.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spunge.errors import RecipeError
from spunge.files import NOT_WRITABLE, about, disk_errors_told, system_error, whole_folder, write_json
from spunge.model.loadable import check_fit, class_of, quiet
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import Checkpoint, file_names, has_model, model_files, read_config
from spunge.weights.described import described_by
from spunge.weights.expressions import Expression, refuse_endless
from spunge.weights.folder import NOTE, copied
from spunge.weights.quantised import (
    EIGHT_BITS,
    SCALE,
    described,
    packed_weights,
    quantisation,
    refuse_8_bits,
    refuse_quantised,
)
from spunge.weights.wrapping import wrappers

BY_FLAG = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")  # their configurations take `dequantize`
UNDONE = (*BY_FLAG, "bitsandbytes")
WIDE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Conversion:
    """What a folder's weights are made into before they can be trained or merged. `quantised`: how they are; None: pickled
    alone."""

    files: tuple[Path, ...]
    quantised: str | None
    gguf: bool = False
    pickled: bool = False


def conversion(folder: Path, setting: str = "model.path") -> Conversion | None:
    """What has to be done to a model's weights; None where they are plain safetensors. Raises RecipeError without weights."""
    ggufs = [name for name in file_names(folder, setting) if name.lower().endswith(".gguf")] if folder.is_dir() else []
    if ggufs and not has_model(folder):
        if len(ggufs) > 1:
            raise RecipeError(
                f"{setting}: {str(folder)!r} holds {len(ggufs)} GGUF files; put the one that is meant into a folder of its own"
            )
        return Conversion((folder / ggufs[0],), f"the GGUF file {ggufs[0]}", gguf=True)
    chosen = model_files(folder, setting)
    if chosen.pickled:
        return Conversion(chosen.files, described(read_config(folder, setting)), pickled=True)
    how = quantisation(Checkpoint(folder, setting))
    return Conversion(chosen.files, how) if how else None


def refuse_untrusted(folder: Path, settings: ModelSettings, setting: str = "model.path") -> None:
    """Raises RecipeError where weights are pickled or quantised and nobody said that they may be converted, and where
    nothing converts them."""
    needed = conversion(folder, setting)
    where = f"{setting}: {settings.path!r}"
    # Only a base and what is merged can be converted; other models are judged as they are.
    flag = "set model.{}=true" if setting == "model.path" else "add --{}" if setting.startswith("--") else None
    if needed is None:
        refuse_8_bits(Checkpoint(folder, setting))
        check_fit(Checkpoint(folder, setting))
        return
    if needed.quantised is not None and not (settings.dequantize and _can_be_undone(folder, needed)):
        undone = flag is not None and _can_be_undone(folder, needed)
        choice = f", or {flag.format('dequantize')} to take its values" if flag is not None and undone else ""
        if not needed.gguf and not needed.pickled:
            refuse_quantised(Checkpoint(folder, setting), choice)
        raise RecipeError(f"{where} is quantised ({needed.quantised}); give the unquantised model{choice}")
    if needed.quantised is None and not settings.allow_pickle:
        name = "allow_pickle" if setting == "model.path" else "allow-pickle"
        asked = "" if flag is None else f", or {flag.format(name)} if you trust them"
        raise RecipeError(
            f"{where} has pickled weights alone ({needed.files[0].name}), which can run code when read; convert them to "
            f"safetensors{asked}"
        )


def _can_be_undone(folder: Path, needed: Conversion) -> bool:
    """Whether transformers dequantises this format, as far as its configuration tells."""
    if needed.gguf or needed.pickled:
        return needed.gguf
    said = read_config(folder, "").get("quantization_config")
    method = said.get("quant_method", "bitsandbytes") if isinstance(said, dict) else None
    return method in UNDONE and next(packed_weights(Checkpoint(folder).tensors), None) is not None


def convert(folder: Path, out: Path, settings: ModelSettings, setting: str = "model.path") -> None:
    """Write a model of pickled or quantised weights as plain safetensors into `out`, absent or empty, with all that lies
    beside it. Raises RecipeError."""
    needed = conversion(folder, setting)
    if needed is None:
        raise RecipeError(f"{setting}: {str(folder)!r} needs no conversion")
    if needed.gguf and sys.version_info < (3, 11):  # transformers does not find gguf's version there
        raise RecipeError(
            f"{setting}: {str(folder)!r} is a GGUF file, which transformers reads on Python 3.11 and newer; convert it there, or "
            "give the unquantised model"
        )
    with whole_folder(out) as aside:
        for inside in copied(folder, out):
            (aside / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / inside, aside / inside)
        try:
            with quiet():
                _convert(folder, aside, needed, settings, setting)
        except RecipeError:
            raise
        except Exception as error:
            refused = system_error(error)
            if refused is not None and refused.errno in (*NOT_WRITABLE, errno.EIO):
                with disk_errors_told(aside), about(aside):
                    raise refused from error
            # Whatever transformers or a library of the format objects to, the missing library above all.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            quantised = f"is quantised ({needed.quantised}) and " if needed.quantised else ""
            raise RecipeError(
                f"{setting}: {str(folder)!r} {quantised}cannot be converted by transformers ({reason})"
            ) from error
        check_fit(Checkpoint(aside, setting))
        named = settings.path if not os.path.isdir(os.path.expanduser(settings.path)) else folder.resolve().name
        write_json(aside / NOTE, {"model": named, "quantised": needed.quantised})


def _convert(folder: Path, out: Path, needed: Conversion, settings: ModelSettings, setting: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = settings.trust_remote_code
    named = {"gguf_file": needed.files[0].name} if needed.gguf else {}
    config = described_by(folder, trust, **named)
    said = getattr(config, "quantization_config", None)
    named_so = [
        Expression(f"{setting}: {str(folder)!r} has {text!r} in its quantization_config", text) for text in _texts(said)
    ]
    refuse_endless(named_so, Checkpoint(folder, setting).tensors if named_so and not needed.gguf else ())
    dtype: Any = "auto"
    if needed.quantised is not None:
        dtype = config.dtype if config.dtype in WIDE else torch.bfloat16
        if isinstance(said, dict) and said.get("quant_method") in BY_FLAG:
            config.quantization_config = {**said, "dequantize": True}
    kind = class_of(config) or AutoModelForCausalLM
    model, loaded = kind.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **named
    )
    if isinstance(said, dict) and said.get("quant_method", "bitsandbytes") == "bitsandbytes" and needed.quantised:
        model = model.dequantize(dtype=model.dtype)
    if needed.quantised is not None:
        _check_undone(folder, needed, model, loaded, setting)
    elif missing := sorted(loaded["missing_keys"]):
        wrapped = wrappers(loaded["unexpected_keys"])
        hint = f"the names in it bear {wrapped}: save the model inside" if wrapped else "save the model whole"
        raise RecipeError(
            f"{setting}: {str(folder)!r} lacks {missing[0]!r}, which transformers would fill at random; {hint}"
        )
    plain = described_by(folder, trust, **named)
    if said is not None:
        del plain.quantization_config
    with torch.device("meta"):
        # A model that does not know how it was stored: transformers would store the loaded one quantised again.
        bare = type(model)(plain).to(model.dtype)
    bare.save_pretrained(out, state_dict=model.state_dict())
    if needed.gguf and not any(out.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, **named).save_pretrained(out)


def _texts(said: Any) -> Iterator[str]:
    """All texts in a configuration's block: any may be a regular expression of layers' names, with or without `re:` before it."""
    if isinstance(said, str):
        yield said.removeprefix("re:")
    for inner in said.values() if isinstance(said, dict) else said if isinstance(said, list) else ():
        yield from _texts(inner)


def _scales_alone(unread: Iterable[str]) -> list[str]:
    """The scales among tensors that were not read, but for those of a weight that was not read either (a layer that
    transformers leaves out)."""
    scales = [name for name in unread if SCALE.search(name.rpartition(".")[2])]
    left_out = {name.rpartition(".")[0] for name in set(unread) - set(scales)}
    return [name for name in scales if name.rpartition(".")[0] not in left_out]


def _check_undone(folder: Path, needed: Conversion, model: Any, loaded: dict[str, Any], setting: str) -> None:
    """Raises RecipeError where transformers left something packed, or took packed numbers without their scales."""
    left = [name for name, value in model.named_parameters() if value.dtype not in WIDE]
    unread = _scales_alone(loaded["unexpected_keys"])
    bare: list[str] = []
    if not needed.gguf:
        tensors = Checkpoint(folder, setting).tensors
        packed = {info.name for info in packed_weights(tensors)}
        bare = [info.name for info in tensors.values() if info.dtype in EIGHT_BITS and info.name not in packed]
    for names, problem in (
        (left, "is still packed"),
        (sorted(unread), "was not read"),
        (sorted(loaded["missing_keys"]), "is missing"),
        (bare, "has no scale"),
    ):
        if names:
            raise RecipeError(
                f"{setting}: {str(folder)!r} is quantised ({needed.quantised}) in a way that transformers does not undo: "
                f"{names[0]!r} {problem}; give the unquantised model"
            )
