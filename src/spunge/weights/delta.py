"""A branch is a delta: what unlearning changed, tensor by tensor, in float32, and nothing else.

`delta.safetensors` holds, for each changed tensor of the base checkpoint (by the checkpoint's own names), the dense
difference (`NAME`), the factors of a low-rank one (`NAME.lora_A` of shape (r, in), `NAME.lora_B` of shape (out, r); with a
first dimension for the experts where one tensor holds all), or
of a sparse one a bit per entry and the entries that are not zero (`NAME.mask`, `NAME.values`); `delta.json` says which,
with the low-rank scale, the base's fingerprint and how the delta was made.
The low-rank difference is scale * B @ A (Hu et al. 2021), transposed where the base stores (in, out) as GPT-2 does.
"""

import errno
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import unwritable, write_json
from spunge.weights.checkpoint import Checkpoint, read_header
from spunge.weights.names import Region

FORMAT = 1


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

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Changed tensor -> {kind: dense | lora | sparse, shape, scale?, transposed?}."""
        entries: dict[str, dict[str, Any]] = self.info["tensors"]
        return entries

    def change(self, name: str) -> Change:
        """The stored form of one tensor's change: dense, or its factors."""
        entry = self.tensors[name]
        stored = Checkpoint(self.folder)
        if entry["kind"] == "dense":
            return stored.read(name)
        if entry["kind"] == "sparse":
            return Sparse(stored.read(f"{name}.mask"), stored.read(f"{name}.values"), tuple(entry["shape"]))
        factors = stored.read(f"{name}.lora_A"), stored.read(f"{name}.lora_B")
        return LowRank(*factors, entry["scale"], entry["transposed"])

    def dense(self, name: str) -> Tensor:
        """One tensor's change in the base's shape, float32."""
        change = self.change(name)
        return change if isinstance(change, Tensor) else change.dense()


def write_delta(folder: Path, changes: Mapping[str, Change], info: Mapping[str, Any]) -> Delta:
    """Write a delta. `info` joins `delta.json`; it must hold `base` (the base checkpoint's fingerprint).

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
            raise RecipeError(f"unlearn: the change of {name!r} is not finite; lower unlearn.learning_rate")
        if all(bool(piece.any()) for piece in pieces.values()):
            stored.update(pieces)
            entries[name] = entry
    if not entries:
        raise RecipeError("unlearn: nothing was changed; raise unlearn.learning_rate or the number of steps")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "delta.safetensors"
    try:
        save_file(stored, file)
    except SafetensorError as error:
        # The library reports the system's error as text alone, "... (os error 28)".
        code = errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else errno.EIO
        raise unwritable(file, OSError(code, str(error))) from error
    content = {"format": FORMAT, **info, "tensors": entries}
    write_json(folder / "delta.json", content)
    return Delta(folder, content)


def _plain(piece: Tensor) -> Tensor:
    piece = piece.detach().contiguous().cpu()
    return piece if piece.dtype == torch.uint8 else piece.float()


def open_delta(folder: Path) -> Delta:
    """Open a written delta. Raises RecipeError when it is missing, of another format, or damaged."""
    file = folder / "delta.json"
    if not file.exists():
        raise RecipeError(f"delta: no delta.json in {str(folder)!r}")
    info = json.loads(file.read_text())
    if info.get("format") != FORMAT:
        raise RecipeError(f"delta: {str(file)!r} has format {info.get('format')!r}, this version reads {FORMAT}")
    read_header(folder / "delta.safetensors")
    return Delta(folder, info)
