"""A model's folder on disk: which safetensors file holds which tensor, read piece by piece, and its fingerprint.

Nothing here needs transformers or loads a whole model. The layout of a safetensors file is: 8 bytes (little-endian
header size), the JSON header, then the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import cache_folder

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offsets in the file
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files. Raises RecipeError when a file is missing, truncated or malformed."""

    folder: Path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the index's order."""
        if not self.folder.is_dir():
            raise RecipeError(f"model.path: no folder {str(self.folder)!r}")
        index = self.folder / INDEX
        if index.exists():
            names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
            files = tuple(self.folder / name for name in names)
        else:
            files = tuple(sorted(self.folder.glob("*.safetensors")))
        if not files:
            raise RecipeError(f"model.path: {str(self.folder)!r} holds no .safetensors file")
        for file in files:
            if not file.exists():
                raise RecipeError(f"model.path: {file.name} is named by {INDEX} but missing from {str(self.folder)!r}")
        return files

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in file order."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            found.update({info.name: info for info in read_header(file)})
        return found

    @cached_property
    def nbytes(self) -> int:
        return sum(info.stop - info.start for info in self.tensors.values())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its first dimension's rows, as a copy in its own dtype."""
        info = self.tensors[name]
        start, stop, shape = info.start, info.stop, info.shape
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            width = (stop - start) // shape[0] if shape[0] else 0
            start, stop, shape = start + first * width, start + last * width, (last - first, *shape[1:])
        buffer = bytearray(stop - start)
        with info.file.open("rb") as stream:
            stream.seek(start)
            if stream.readinto(buffer) != len(buffer):
                raise RecipeError(f"model.path: {info.file.name} ends inside tensor {name!r}")
        if not buffer:
            return torch.empty(shape, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)

    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and bytes: equal for equal weights however they are sharded.

        Remembered per user, by the files' paths, sizes and times: hashing 13.5 GB takes longer than merging into it.
        """
        known = _Remembered(self.files)
        if (found := known.read()) is None:
            found = self._hashed()
            known.write(found)
        return found

    def _hashed(self) -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = dict(zip(self.tensors, pool.map(_tensor_digest, self.tensors.values()), strict=True))
        total = hashlib.sha256()
        for name in sorted(digests):
            total.update(f"{name}:{digests[name]}\n".encode())
        return total.hexdigest()


class _Remembered:
    """One fingerprint in the user's cache; where that cannot be written, nothing is remembered."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        stamps = [(str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
        self.place = cache_folder() / "fingerprints" / hashlib.sha256(repr(stamps).encode()).hexdigest()
        # A file written a moment ago may be written again within the clock's step: do not trust its time yet.
        self.settled = all(time.time_ns() - stamp[2] > 2_000_000_000 for stamp in stamps)

    def read(self) -> str | None:
        with contextlib.suppress(OSError):
            text = self.place.read_text()
            return text if self.settled and len(text) == 64 else None
        return None

    def write(self, fingerprint: str) -> None:
        if self.settled:
            with contextlib.suppress(OSError):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                aside = self.place.with_name(f"{self.place.name}.{os.getpid()}")
                aside.write_text(fingerprint)
                os.replace(aside, self.place)


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file. Raises RecipeError when the header and the file's size disagree."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise RecipeError(f"model.path: {file.name} is truncated or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise RecipeError(f"model.path: {file.name} has a broken safetensors header ({error})") from None
    header.pop("__metadata__", None)
    infos = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise RecipeError(
                f"model.path: {file.name} stores {name!r} as {entry['dtype']}; known: {', '.join(DTYPES)}"
            )
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if stop > size:
            raise RecipeError(f"model.path: {file.name} is truncated: it ends before tensor {name!r}")
        info = TensorInfo(name, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
        if info.numel * info.dtype.itemsize != stop - start:
            raise RecipeError(
                f"model.path: {file.name} is corrupt: the size of tensor {name!r} is not that of its shape"
            )
        infos.append(info)
    return sorted(infos, key=lambda info: info.start)


def _tensor_digest(info: TensorInfo) -> str:
    digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        left = info.stop - info.start
        while left:
            piece = stream.read(min(left, 1 << 22))
            if not piece:
                raise RecipeError(f"model.path: {info.file.name} ends inside tensor {info.name!r}")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
