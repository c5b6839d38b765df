"""Where each tensor of the merged checkpoint is written: in the base's files and order, each in the dtype it is to have.

A file whose tensors all keep their dtype is laid out as the base's, byte for byte, header included. Another one gets a
header of its own (https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.header import DTYPES, TensorInfo, read_header
from spunge.weights.rounding import all_finite

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileLayout:
    """One file of the output."""

    source: Path  # the base's
    name: str  # relative to the folder
    header: bytes | None  # None: as the base's, and so is everything behind it
    tensors: dict[str, TensorInfo]  # as in the output: dtype, and the place in its file
    size: int


def laid_out(base: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> list[FileLayout]:
    """The output's files, in the base's order."""
    return [_file(file, base, dtypes) for file in base.files]


def _file(file: Path, base: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> FileLayout:
    name, infos = str(file.relative_to(base.folder)), read_header(file, base.setting)
    if all(dtypes[info.name] == info.dtype for info in infos):
        return FileLayout(file, name, None, {info.name: info for info in infos}, file.stat().st_size)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for info in infos:
        stop = at + info.numel * dtypes[info.name].itemsize
        entries[info.name] = {
            "dtype": _NAMES[dtypes[info.name]],
            "shape": list(info.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, as the format asks
    header = len(text).to_bytes(8, "little") + text
    tensors = {}
    for info in infos:
        start, stop = (len(header) + offset for offset in entries[info.name]["data_offsets"])
        tensors[info.name] = TensorInfo(info.name, file, dtypes[info.name], info.shape, start, stop)
    return FileLayout(file, name, header, tensors, len(header) + at)


def check_finite(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises RecipeError where a tensor of the base is too large for the dtype that it is to be written in."""
    if not all_finite(values):
        shown = str(dtype).removeprefix("torch.")
        raise RecipeError(
            f"merge.dtype: tensor {name!r} of the base holds values that {shown} does not; choose float32"
        )
