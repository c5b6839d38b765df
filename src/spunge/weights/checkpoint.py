"""A model's folder on disk: which files are the model, which file holds which tensor, read piece by piece; its fingerprint.

Which files are the model is decided as transformers decides (`_get_resolved_checkpoint_files` in its modeling_utils.py):
`model.safetensors` before `model.safetensors.index.json` before `pytorch_model.bin` before its index. Every other file is
left out of account: variants, backups, `consolidated*`, optimizer states, other formats, subfolders. All tensors of the
files that the index names are the model's, whatever its map says of each, and where two files hold one name, the last
file by name wins. Nothing here needs transformers or loads a whole model.
"""

import contextlib
import hashlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import cache_folder, is_inside, parse_json, read_json, sealed, unsealed, write_json
from spunge.weights.header import TensorInfo, read_header
from spunge.weights.wrapping import unwrapped

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
SAFE = (".safetensors", ".safetensors.index.json")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class ModelFiles:
    """The files that hold a model's tensors, and the index that names them, where there is one."""

    files: tuple[Path, ...]
    index: Path | None
    pickled: bool


def model_files(folder: Path, setting: str = "model.path") -> ModelFiles:
    """The files that transformers loads from a folder. `setting` is the recipe's key or the option, for errors.

    Raises RecipeError where there are none, where one is missing, and where transformers would load something else with
    them: an adapter that lies beside the model, the shards of a distributed checkpoint.
    """
    if not os.path.isdir(folder):
        raise RecipeError(f"{setting}: no folder {str(folder)!r}")
    config = read_config(folder, setting)
    if odd := [name for name in file_names(folder, setting) if _DISTRIBUTED.fullmatch(name)]:
        raise RecipeError(
            f"{setting}: {str(folder)!r} holds {odd[0]}, a shard of a distributed checkpoint, which transformers reads in place of "
            "every other file; save the model whole, with save_pretrained"
        )
    if has_model(folder) and (folder / ADAPTER).is_file():
        raise RecipeError(
            f"{setting}: {str(folder)!r} holds an adapter ({ADAPTER}) beside the model, and transformers lays it over the "
            "model's weights; merge it into them with peft, or move it out of the folder"
        )
    named = config.get("transformers_weights")
    if named is not None and not (is_inside(str(named)) and str(named).endswith(SAFE)):
        raise RecipeError(
            f"{setting}: config.json names the weights {named!r}, which is no safetensors file of its folder"
        )
    for name in (WHOLE, INDEX, PICKLED, PICKLED_INDEX) if named is None else (str(named),):
        file = folder / name
        if os.path.isfile(file):
            pickled = not name.endswith(SAFE)
            if name.endswith(".index.json"):
                return ModelFiles(_shards(folder, file, setting), file, pickled)
            return ModelFiles((file,), None, pickled)
    raise RecipeError(f"{setting}: {_what_there_is(folder, setting)}")


def has_model(folder: Path) -> bool:
    """Whether a folder holds a model: with an adapter beside it or not, whole or not."""
    names = ("config.json", WHOLE, INDEX, PICKLED, PICKLED_INDEX)
    configured, *weights = ((folder / name).is_file() for name in names)
    return configured and any(weights)


def _shards(folder: Path, index: Path, setting: str) -> tuple[Path, ...]:
    """The files that an index names, sorted by name as transformers sorts them."""
    content = read_object(index, setting)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise RecipeError(f"{setting}: {index.name} is damaged: it has no weight_map from tensors to files")
    if not weight_map:
        raise RecipeError(f"{setting}: {index.name} names no file; download it again")
    for name in (names := sorted(set(weight_map.values()))):
        if not is_inside(name):
            raise RecipeError(f"{setting}: {index.name} names {name!r}, which is no file of its folder")
        if not os.path.isfile(folder / name):
            raise RecipeError(f"{setting}: {name} is named by {index.name} but missing from {str(folder)!r}")
        if name.endswith(".safetensors") != index.name.endswith(".safetensors.index.json"):
            raise RecipeError(f"{setting}: {index.name} names {name}, which is of another format")
    return tuple(folder / name for name in names)


def file_names(folder: Path, setting: str) -> list[str]:
    """The names of the files in a folder, sorted. Raises RecipeError where it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise RecipeError(f"{setting}: {str(folder)!r} cannot be read ({error.strerror})") from None


def _what_there_is(folder: Path, setting: str) -> str:
    """Why a folder holds no model: what lies there instead."""
    there = file_names(folder, setting)
    wanted = f"transformers reads {WHOLE} or {INDEX}"
    if ADAPTER in there:
        return f"{str(folder)!r} holds an adapter and no weights of a model; give the model it was made from"
    if gguf := [name for name in there if name.lower().endswith(".gguf")]:
        return (
            f"{str(folder)!r} holds no weights but a GGUF file ({gguf[0]}), the quantised format of llama.cpp; "
            "give the unquantised model"
        )
    if others := [name for name in there if name.endswith(".safetensors")]:
        return (
            f"{str(folder)!r} holds no weights under the name that {wanted}, but {_few(others)}; rename or index them"
        )
    ends = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
    if others := [name for name in there if name.endswith(ends)]:
        return f"{str(folder)!r} holds no weights that can be read, but {_few(others)}; {wanted}"
    return f"{str(folder)!r} holds no weights ({wanted}){_inner(folder)}"


def _inner(folder: Path) -> str:
    """Which of its folders hold weights, in the order of the numbers in their names: checkpoint-500, checkpoint-1000."""
    held = {
        path.parent.name
        for name in (WHOLE, INDEX, PICKLED, PICKLED_INDEX, ADAPTER)
        for path in folder.glob(f"*/{name}")
    }
    inner = sorted(
        held, key=lambda name: [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
    )
    if len(inner) < 2:
        return f"; its folder {inner[0]!r} does" if inner else ""
    shown = [*map(repr, inner[:2]), *(["..."] if len(inner) > 3 else []), *map(repr, inner[2:][-1:])]
    return f"; its folders {', '.join(shown)} do: give one of these, such as the last"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def read_object(file: Path, setting: str) -> dict[str, Any]:
    """The JSON object in a file. Raises RecipeError, one line with the file's name, where there is none."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{setting}: {file.name} in {str(file.parent)!r} cannot be read ({reason})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{setting}: {file.name} in {str(file.parent)!r} is damaged: it holds no JSON object")
    return content


def read_config(folder: Path, setting: str = "model.path") -> dict[str, Any]:
    """A model's config.json, or {} where there is none. Raises RecipeError where it is damaged."""
    file = folder / "config.json"
    return read_object(file, setting) if file.is_file() else {}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder, or of one file (`of`) in a delta's or an adapter's. `setting`: for errors. `plain`: by the
    names that the model itself has for them, where what ran it has written its own into them (see `wrapping`).

    Raises RecipeError when a file is missing, cut short or damaged, or when the weights are pickled.
    """

    folder: Path
    setting: str = "model.path"
    of: str | None = None
    plain: bool = False

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in the order in which they are read."""
        if self.of is not None:
            file = self.folder / self.of
            if not file.is_file():
                raise RecipeError(f"{self.setting}: {self.of} is missing from {str(self.folder)!r}")
            return (file,)
        chosen = model_files(self.folder, self.setting)
        if chosen.pickled:
            raise RecipeError(
                f"{self.setting}: {str(self.folder)!r} has pickled weights alone ({chosen.files[0].name}), which can run code "
                "when read; convert them to safetensors"
            )
        return chosen.files

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in file order; of a name that two files hold, the last file's."""
        stored = {info.name: info for file in self.files for info in read_header(file, self.setting)}
        return {name: stored[own] for own, name in unwrapped(stored).items()} if self.plain else stored

    @cached_property
    def embeddings(self) -> list[str]:
        """The matrices with a row for each token: embeddings and output layers."""
        config = read_config(self.folder, self.setting)
        text = config.get("text_config")
        size = (text if isinstance(text, dict) else config).get("vocab_size", config.get("vocab_size"))
        return [name for name, info in self.tensors.items() if len(info.shape) == 2 and info.shape[0] == size]

    @cached_property
    def twins(self) -> dict[str, str]:
        """Embeddings that are stored a second time, as tied output layers can be -> the first of the two."""
        pairs = [(one, other) for place, one in enumerate(self.embeddings) for other in self.embeddings[place + 1 :]]
        return {other: one for one, other in reversed(pairs) if self._are_the_same(one, other)}

    def _are_the_same(self, one: str, other: str) -> bool:
        if (self.tensors[one].dtype, self.tensors[one].shape) != (self.tensors[other].dtype, self.tensors[other].shape):
            return False
        rows, step = (
            self.tensors[one].shape[0],
            8,
        )  # the first few tell nearly always; never two whole embeddings in memory
        start = 0
        while start < rows:
            some = slice(start, start + step)
            if not torch.equal(self.read(one, some), self.read(other, some)):
                return False
            start, step = start + step, 1024
        return True

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
                raise RecipeError(f"{self.setting}: {info.file.name} ends inside tensor {name!r}")
        if not buffer:
            return torch.empty(shape, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)

    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and bytes: equal for equal weights however they are sharded.

        Remembered per user, by the files' paths, sizes and times: hashing 13.5 GB takes longer than merging into it.
        """
        known = _Remembered(self.files)
        if (digest := known.read()) is None:
            digest = self._hashed()
            known.write(digest)
        return digest

    def _hashed(self) -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = dict(zip(self.tensors, pool.map(self._digest, self.tensors.values()), strict=True))
        total = hashlib.sha256()
        for name in sorted(digests):
            total.update(f"{name}:{digests[name]}\n".encode())
        return total.hexdigest()

    def _digest(self, info: TensorInfo) -> str:
        digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            left = info.stop - info.start
            while left:
                piece = stream.read(min(left, 1 << 22))
                if not piece:
                    raise RecipeError(f"{self.setting}: {info.file.name} ends inside tensor {info.name!r}")
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()


class _Remembered:
    """One fingerprint in the user's cache; where that cannot be written, nothing is remembered."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        # The time of the last change too, which nobody sets: archives and `cp -p` give different files one time of writing.
        stamps = [
            (str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns, status.st_ctime_ns)
            for file in files
        ]
        self.file = cache_folder() / "fingerprints" / hashlib.sha256(repr(stamps).encode()).hexdigest()
        # A file written a moment ago may be written again within the clock's step: do not trust its time yet.
        self.settled = all(time.time_ns() - max(stamp[2:]) > 2_000_000_000 for stamp in stamps)

    def read(self) -> str | None:
        with contextlib.suppress(OSError):
            content = unsealed(read_json(self.file)) if self.settled else None
            return None if content is None else str(content["fingerprint"])
        return None

    def write(self, fingerprint: str) -> None:
        if self.settled:
            with contextlib.suppress(RecipeError):
                write_json(self.file, sealed({"fingerprint": fingerprint}))
