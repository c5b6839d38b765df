"""The header of a safetensors file: which tensors the file holds, of which dtype and shape, and where they lie in it.

The layout: 8 bytes (little-endian header size), the JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The header is checked as the safetensors library checks it, so that a file
that transformers does not load is refused here, in one line.
"""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from spunge.errors import RecipeError

LARGEST = 100_000_000  # bytes of a header, the safetensors library's own limit

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # entries that are no whole bytes: quantised weights alone have them


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor. `start` and `stop` are byte offsets in the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path, setting: str = "model.path") -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes. `setting` names the recipe's key or the option.

    Raises RecipeError, one line with the file's name, for a file that is cut short, damaged, or of another kind.
    """
    try:
        header, begin, size = _header(file, setting)
    except OSError as error:
        raise RecipeError(f"{setting}: {file.name} cannot be read ({error.strerror}) in {str(file.parent)!r}") from None
    header.pop("__metadata__", None)
    infos = [_info(name, entry, file, begin, setting) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    at = begin
    for info in infos:
        if info.start != at:
            kind = "overlaps another" if info.start < at else "does not follow the one before it"
            raise RecipeError(f"{setting}: {file.name} is damaged: tensor {_short(info.name)} {kind}")
        if info.stop > size:
            raise RecipeError(f"{setting}: {file.name} is truncated: it ends before tensor {_short(info.name)} does")
        at = info.stop
    if at != size:
        raise RecipeError(f"{setting}: {file.name} is damaged: {size - at} bytes after its last tensor belong to none")
    return infos


def _header(file: Path, setting: str) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the offset at which the tensors begin, and the file's size."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RecipeError(f"{setting}: {file.name} is no file")
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if first.startswith(b"version "):
            raise RecipeError(
                f"{setting}: {file.name} is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder"
            )
        if len(first) < 8 or length > status.st_size - 8 or length > LARGEST:
            raise RecipeError(f"{setting}: {file.name} is truncated or no safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{setting}: {file.name} has a broken safetensors header ({reason})") from None
    if isinstance(header, dict) and header.get("__metadata__", header) is None:
        del header["__metadata__"]  # null is none, to the library too
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RecipeError(f"{setting}: {file.name} has a broken safetensors header (it is no table of tensors)")
    return header, 8 + length, status.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that comes twice, or is no text."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{_short(name)} comes twice")
        name.encode("utf-8")  # JSON can spell half a character, which no file can hold again
        content[name] = value
    return content


def _info(name: str, entry: Any, file: Path, begin: int, setting: str) -> TensorInfo:
    """One entry of the header, its offsets counted from the file's beginning. Raises RecipeError."""
    damaged = f"{setting}: {file.name} is damaged:"
    problem = f"{damaged} tensor {_short(name)} has"
    if not isinstance(entry, dict):
        raise RecipeError(f"{problem} no dtype, shape and offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape):
        raise RecipeError(f"{problem} the shape {_short(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise RecipeError(f"{problem} the offsets {_short(offsets)}")
    if dtype in PACKED:
        raise RecipeError(
            f"{setting}: {file.name} stores {_short(name)} as {dtype}: a quantised checkpoint; give the unquantised model"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RecipeError(
            f"{setting}: {file.name} stores {_short(name)} with the dtype {_short(dtype)}; known: {', '.join(DTYPES)}"
        )
    if _product(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise RecipeError(f"{damaged} the size of tensor {_short(name)} is not that of its shape")
    return TensorInfo(name, file, DTYPES[dtype], tuple(shape), begin + offsets[0], begin + offsets[1])


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of numbers 0, 1, 2 ... below 2**63 (JSON's true is a number to Python)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _product(shape: list[int]) -> int:
    """The number of entries, or some number that no file's size can reach."""
    if 0 in shape:
        return 0
    total = 1
    for length in shape:
        total *= length
        if total >= 1 << 63:
            break
    return total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:160] + "..."
