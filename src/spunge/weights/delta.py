"""A branch is a delta: what unlearning changed, tensor by tensor, in float32, and nothing else.

`delta.safetensors` holds, for each changed tensor of the base checkpoint (by the checkpoint's own names), the dense
difference (`NAME`), the factors of a low-rank one (`NAME.lora_A` of shape (r, in), `NAME.lora_B` of shape (out, r); with a
first dimension for the experts where one tensor holds all), or
of a sparse one a bit per entry and the entries that are not zero (`NAME.mask`, `NAME.values`); `delta.json` says which,
with the low-rank scale, the base's fingerprint and how the delta was made.
The low-rank difference is scale * B @ A (Hu et al. 2021), transposed where the base stores (in, out) as GPT-2 does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import write_json
from spunge.weights.checkpoint import Checkpoint, read_object
from spunge.weights.header import TensorInfo
from spunge.weights.names import Region
from spunge.weights.writing import write_tensors

FORMAT = 1
DESCRIPTION, WEIGHTS = "delta.json", "delta.safetensors"


class LowRank(NamedTuple):
    """scale * B @ A, in float32; for experts in one tensor a product for each of them."""

    A: Tensor  # (r, in) or (experts, r, in)
    B: Tensor  # (out, r) or (experts, out, r)
    scale: float
    transposed: bool = False  # the base's tensor is (in, out)

    @property
    def shape(self) -> tuple[int, ...]:
        out, columns = self.B.shape[-2], self.A.shape[-1]
        return (*self.A.shape[:-2], *((columns, out) if self.transposed else (out, columns)))

    def dense(self) -> Tensor:
        product = (self.B.float() @ self.A.float()) * self.scale
        return product.transpose(-1, -2).contiguous() if self.transposed else product

    def part(self, region: Region) -> "LowRank":
        """The factors of a region of the difference: an expert's, or those of some rows."""
        leading = self.A.ndim - 2
        rows, columns, *_ = (*region.at[leading:], slice(None), slice(None))
        inside, outside = (rows, columns) if self.transposed else (columns, rows)
        expert = (*region.at[:leading], ...)
        a, b = self.A[expert][..., :, inside], self.B[expert][..., outside, :]
        return LowRank(a, b, self.scale, self.transposed != region.transposed)


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # set bits of each byte


class Sparse(NamedTuple):
    """Few entries that are not zero: exact, and small where a merge has trimmed most."""

    mask: Tensor  # uint8, one bit per entry, the first entry in the highest bit
    values: Tensor  # float32, the entries whose bit is set
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dense: Tensor) -> "Sparse":
        there = dense.reshape(-1) != 0
        return cls(torch.from_numpy(np.packbits(there.numpy())), dense.reshape(-1)[there].float(), tuple(dense.shape))

    def dense(self) -> Tensor:
        return self.entries(0, math.prod(self.shape)).reshape(self.shape)

    def entries(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the flattened difference, float32."""
        mask = self.mask.numpy()
        first = start // 8
        there = np.unpackbits(mask[first : -(-stop // 8)])[start - 8 * first : stop - 8 * first].astype(bool)
        skipped = int(_ONES[mask[:first]].sum()) + int(
            np.unpackbits(mask[first : first + 1])[: start - 8 * first].sum()
        )
        out = torch.zeros(stop - start)
        out[torch.from_numpy(there)] = self.values[skipped : skipped + int(there.sum())]
        return out


Change = Tensor | LowRank | Sparse


@dataclass(frozen=True)
class Delta:
    """A delta on disk, read tensor by tensor."""

    folder: Path
    info: dict[str, Any]
    setting: str = "delta"  # for errors

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Changed tensor -> {kind: dense | lora | sparse, shape, scale?, transposed?}."""
        entries: dict[str, dict[str, Any]] = self.info["tensors"]
        return entries

    @cached_property
    def stored(self) -> Checkpoint:
        """The tensors of delta.safetensors."""
        return Checkpoint(self.folder, self.setting, WEIGHTS)

    def change(self, name: str) -> Change:
        """The stored form of one tensor's change: dense, or its factors."""
        entry = self.tensors[name]
        if entry["kind"] == "dense":
            return self.stored.read(name)
        if entry["kind"] == "sparse":
            sparse = Sparse(self.stored.read(f"{name}.mask"), self.stored.read(f"{name}.values"), tuple(entry["shape"]))
            if int(_ONES[sparse.mask.numpy()].sum()) != len(sparse.values):
                raise RecipeError(
                    f"{self.setting}: {WEIGHTS} in {str(self.folder)!r} is damaged: {name!r} has {len(sparse.values)} values "
                    "where its mask counts others"
                )
            return sparse
        factors = self.stored.read(f"{name}.lora_A"), self.stored.read(f"{name}.lora_B")
        return LowRank(*factors, entry["scale"], entry["transposed"])

    def dense(self, name: str) -> Tensor:
        """One tensor's change in the base's shape, float32."""
        change = self.change(name)
        return change if isinstance(change, Tensor) else change.dense()


def write_delta(
    folder: Path, changes: Mapping[str, Change], info: Mapping[str, Any], setting: str = "unlearn"
) -> Delta:
    """Write a delta. `info` joins `delta.json`; it must hold `base` (the base checkpoint's fingerprint). setting: for errors.

    Tensors whose change is all zero are left out. Raises RecipeError when a change is not finite and
    when nothing was changed at all.
    """
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        if isinstance(change, LowRank):
            entry: dict[str, Any] = {
                "kind": "lora",
                "shape": list(change.shape),
                "scale": change.scale,
                "transposed": change.transposed,
            }
            pieces = {f"{name}.lora_A": change.A, f"{name}.lora_B": change.B}
        elif isinstance(change, Sparse):
            entry = {"kind": "sparse", "shape": list(change.shape)}
            pieces = {f"{name}.mask": change.mask, f"{name}.values": change.values}
        else:
            entry = {"kind": "dense", "shape": list(change.shape)}
            pieces = {name: change}
        pieces = {key: _plain(piece) for key, piece in pieces.items()}
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces.values()):
            raise RecipeError(f"{setting}: the change of {name!r} is not finite; lower {setting}.learning_rate")
        if all(bool(piece.any()) for piece in pieces.values()):
            stored.update(pieces)
            entries[name] = entry
    if not entries:
        raise RecipeError(f"{setting}: nothing was changed; raise {setting}.learning_rate or the number of steps")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, stored)
    content = {"format": FORMAT, **info, "tensors": entries}
    write_json(folder / DESCRIPTION, content)
    return Delta(folder, content)


def _plain(piece: Tensor) -> Tensor:
    piece = piece.detach().contiguous().cpu()
    return piece if piece.dtype == torch.uint8 else piece.float()


def open_delta(folder: str | Path, setting: str = "delta") -> Delta:
    """Open a written delta. Raises RecipeError when it is missing, of another format, or damaged: every entry of delta.json
    must have its tensors in delta.safetensors, in the shapes that it says, and every tensor its entry."""
    folder = Path(folder)
    file = folder / DESCRIPTION
    if not file.exists():
        raise RecipeError(f"{setting}: no {DESCRIPTION} in {str(folder)!r}")
    info = read_object(file, setting)
    if info.get("format") != FORMAT:
        raise RecipeError(
            f"{setting}: {str(file)!r} has format {info.get('format')!r}, this version of spunge reads {FORMAT}"
        )
    entries = info.get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise RecipeError(f"{setting}: {str(file)!r} is damaged: it says of no tensor what was changed")
    delta = Delta(folder, info, setting)
    wanted = {key for name, entry in entries.items() for key in _pieces(name, entry)}
    for name, entry in entries.items():
        if problem := _misfit(name, entry, delta.stored.tensors):
            raise RecipeError(f"{setting}: {str(file)!r} does not fit {WEIGHTS}: {problem}")
    if odd := sorted(set(delta.stored.tensors) - wanted):
        raise RecipeError(f"{setting}: {str(file)!r} does not fit {WEIGHTS}: it says nothing of tensor {odd[0]!r}")
    return delta


def _pieces(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The stored tensors of one entry."""
    ends = {"lora": (".lora_A", ".lora_B"), "sparse": (".mask", ".values")}.get(str(entry.get("kind")), ("",))
    return tuple(name + end for end in ends)


def _misfit(name: str, entry: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong with an entry of delta.json, beside the tensors that are stored."""
    kind, shape = entry.get("kind"), entry.get("shape")
    if kind not in ("dense", "lora", "sparse"):
        return f"{name!r} is of the kind {kind!r}"
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        return f"{name!r} has the shape {shape!r}"
    for key in _pieces(name, entry):
        if key not in stored:
            return f"there is no tensor {key!r}"
        packed = key == f"{name}.mask" and kind == "sparse"
        if stored[key].dtype != torch.uint8 if packed else not stored[key].dtype.is_floating_point:
            return f"{key!r} is stored as {stored[key].dtype}"
    shapes = [stored[key].shape for key in _pieces(name, entry)]
    if kind == "dense":
        return None if shapes == [tuple(shape)] else f"{name!r} is stored with the shape {list(shapes[0])}"
    if kind == "sparse":
        numel = math.prod(shape)
        whole = shapes[0] == (-(-numel // 8),) and len(shapes[1]) == 1 and shapes[1][0] <= numel
        return None if whole else f"the mask and the values of {name!r} are not those of the shape {shape}"
    scale, transposed = entry.get("scale"), entry.get("transposed")
    if not isinstance(scale, int | float) or not math.isfinite(scale) or not isinstance(transposed, bool):
        return f"{name!r} has the scale {scale!r} and is transposed: {transposed!r}"
    a, b = shapes
    if [len(a), len(b)] not in ([2, 2], [3, 3]) or a[:-2] != b[:-2] or a[-2] != b[-1]:
        return f"the factors of {name!r} do not multiply"
    product = [*a[:-2], *((a[-1], b[-2]) if transposed else (b[-2], a[-1]))]
    return None if shape == product else f"the factors of {name!r} give {product}"
