"""Other models as differences from the base: a spunge delta, a full checkpoint, a PEFT adapter.

A source names the tensors it changes and gives any run of their entries as float32, so that a merge never holds more than
a few chunks. A LoRA difference is formed in fixed blocks of rows: its rounding does not depend on how the work is cut up.
"""

import hashlib
import json
import math
import mmap
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, Delta, LowRank, Sparse
from spunge.weights.header import TensorInfo
from spunge.weights.matching import Held
from spunge.weights.names import Region

BLOCK = 1 << 17  # entries of a LoRA difference that are formed at once, about: whole rows, at fixed places
ROWS = 8, 128  # the least and the most rows of one: fewer are slow to form, more are formed for nothing


class Source(Protocol):
    """One branch of a merge."""

    @property
    def label(self) -> str:
        """For messages and reports."""

    @property
    def setting(self) -> str:
        """The recipe's key or the option that gave it, for errors."""

    @property
    def fingerprint(self) -> str:
        """Of its content."""

    @property
    def base(self) -> str | None:
        """Fingerprint of the base it was made from, where it says so."""

    @property
    def stamps(self) -> Sequence[tuple[int, int]]:
        """Size and time of its files, beside the fingerprint; see `stamps`."""

    @property
    def notes(self) -> Sequence[str]:
        """What is odd about it, for people."""

    @property
    def names(self) -> Collection[str]:
        """The base's tensors that this source changes."""

    def stored(self, name: str) -> Tensor | None:
        """The whole difference, flat, where it lies dense and in float32 in a file."""

    def raw(self, name: str) -> Tensor | None:
        """The model's own values, flat, in its own dtype, where the source is a full model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a changed tensor."""

    def read(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Entries start..stop of the flattened difference, float32; `base` holds the base's own, float32."""


class Mapped:
    """Tensors of a checkpoint as flat views into mapped files: nothing is read before it is used, nothing is copied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def view(self, name: str) -> Tensor:
        """The whole tensor, flat, in its own dtype; do not write into it."""
        return self.view_of(self.checkpoint.tensors[name])

    def view_of(self, info: TensorInfo) -> Tensor:
        """The same for a tensor that another file of the checkpoint holds under the same name."""
        if not info.numel:
            return torch.empty(0, dtype=info.dtype)
        with self._lock:
            if info.file not in self._files:
                self._files[info.file] = _map(info.file)
        mapped = self._files[info.file]
        if info.start % info.dtype.itemsize:
            return torch.frombuffer(bytearray(mapped[info.start : info.stop]), dtype=info.dtype)
        return torch.frombuffer(mapped, dtype=info.dtype, count=info.numel, offset=info.start)


def _map(file: Path) -> mmap.mmap:
    """A private mapping: torch wants writable memory, and MAP_NORESERVE (0x4000 on Linux) reserves none for it."""
    with file.open("rb") as stream:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0)
            return mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


@dataclass
class DeltaSource:
    """A spunge delta: dense differences or LoRA factors, in float32."""

    delta: Delta
    label: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.label = self.label or self.delta.folder.name
        self._mapped = Mapped(self.delta.stored)
        self._opened: dict[str, Change] = {}

    @property
    def setting(self) -> str:
        return self.delta.setting

    @property
    def names(self) -> Collection[str]:
        return self.delta.tensors

    @property
    def base(self) -> str | None:
        """Fingerprint of the base it was made from."""
        return self.delta.info.get("base")

    @cached_property
    def fingerprint(self) -> str:
        if all(entry["kind"] == "sparse" for entry in self.delta.tensors.values()):
            return sketch_of_differences({name: self.shape(name) for name in self.names}, self._entries)
        return sketch(self.delta.stored, json.dumps(self.delta.tensors, sort_keys=True))

    @property
    def stamps(self) -> list[tuple[int, int]]:
        return stamps(self.delta.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.delta.tensors[name]["shape"])

    def stored(self, name: str) -> Tensor | None:
        if self.delta.tensors[name]["kind"] != "dense":
            return None
        values = self._mapped.view(name)
        return values if values.dtype == torch.float32 else None

    def raw(self, name: str) -> Tensor | None:
        return None

    def read(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        return self._entries(name, start, stop)

    def _entries(self, name: str, start: int, stop: int) -> Tensor:
        if self.delta.tensors[name]["kind"] == "dense":
            return self._mapped.view(name)[start:stop].float()
        change = self._opened.get(name)
        if change is None:
            change = self.delta.change(name)
            self._opened = dict([*self._opened.items(), (name, change)][-4:])  # tensors come one after the other
        if isinstance(change, LowRank):
            return low_rank_entries(change, start, stop)
        return change.entries(start, stop) if isinstance(change, Sparse) else change.reshape(-1)[start:stop]


@dataclass
class CheckpointSource:
    """A full fine-tuned model: its difference from the base is taken entry by entry, in float32."""

    checkpoint: Checkpoint
    label: str
    held: Mapping[str, Held]  # the base's tensor -> how it is stored here
    notes: Sequence[str] = ()
    base: str | None = None

    def __post_init__(self) -> None:
        self._mapped = Mapped(self.checkpoint)
        self._put_together: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def setting(self) -> str:
        return self.checkpoint.setting

    @property
    def names(self) -> Collection[str]:
        return self.held

    @cached_property
    def fingerprint(self) -> str:
        return sketch(self.checkpoint)

    @property
    def stamps(self) -> list[tuple[int, int]]:
        return stamps(self.checkpoint)

    def shape(self, name: str) -> tuple[int, ...]:
        held = self.held[name]
        return tuple(held.region.of(torch.empty(held.shape, device="meta")).shape)

    def stored(self, name: str) -> Tensor | None:
        return None

    def raw(self, name: str) -> Tensor:
        held = self.held[name]
        if held.name is not None:
            return self._mapped.view(held.name)
        with self._lock:  # tensors come one after the other, in many chunks each
            if name not in self._put_together:
                tensors = self.checkpoint.tensors
                values = {stored: self._mapped.view(stored).view(tensors[stored].shape) for stored, _ in held.pieces}
                kept = list(self._put_together.items())[-3:]
                self._put_together = dict([*kept, (name, held.of(values).reshape(-1))])
            return self._put_together[name]

    def read(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        return self.raw(name)[start:stop].float() - base


@dataclass
class AdapterSource:
    """A PEFT adapter: scale * B @ A per layer of a LoRA, what peft makes of the other layers, the modules it stores whole."""

    label: str
    fingerprint: str
    factors: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)  # tensors stored whole (`modules_to_save`, biases)
    merged: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)  # what peft has to form: DoRA, IA3 ...
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of `merged`
    notes: Sequence[str] = ()
    base: str | None = None
    stamps: Sequence[tuple[int, int]] = ()
    setting: str = "--model"

    def __post_init__(self) -> None:
        self._formed: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> Collection[str]:
        return dict.fromkeys([*self.factors, *self.replaced, *self.merged])

    def stored(self, name: str) -> Tensor | None:
        return None

    def raw(self, name: str) -> Tensor | None:
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.replaced:
            return tuple(self.replaced[name].shape)
        return self.factors[name].shape if name in self.factors else self.shapes[name]

    def read(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        if name in self.merged:
            return self._difference(name)[start:stop]
        if name not in self.replaced:
            return low_rank_entries(self.factors[name], start, stop)
        stored = self.replaced[name].reshape(-1)[start:stop].float() - base
        return stored + low_rank_entries(self.factors[name], start, stop) if name in self.factors else stored

    def _difference(self, name: str) -> Tensor:
        """The whole difference, flat; the last few are kept, since tensors come one after the other in many chunks each."""
        with self._lock:
            if name not in self._formed:
                formed = self.merged[name]().reshape(-1)
                self._formed = dict([*list(self._formed.items())[-3:], (name, formed)])
            return self._formed[name]


def low_rank_entries(factors: LowRank, start: int, stop: int) -> Tensor:
    """Entries start..stop of the flattened product, from whole blocks of rows at fixed places."""
    if factors.A.ndim == 3:
        size = math.prod(factors.shape[1:])
        experts = range(start // size, -(-stop // size))
        ends = [(max(start - expert * size, 0), min(stop - expert * size, size)) for expert in experts]
        pairs = zip(experts, ends, strict=True)
        pieces = [low_rank_entries(factors.part(Region((expert,))), *inside) for expert, inside in pairs]
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]
    rows, columns = factors.shape
    together = min(ROWS[1], max(ROWS[0], BLOCK // max(1, columns)))
    block = together * columns
    entries = torch.empty(stop - start)  # its own: a view would keep a whole block
    for number in range(start // block, -(-stop // block)):
        first, last = number * together, min(rows, (number + 1) * together)
        offset = number * block
        inside = factors.part(Region((slice(first, last),))).dense().reshape(-1)[max(start - offset, 0) : stop - offset]
        at = max(start, offset) - start
        entries[at : at + inside.numel()] = inside
    return entries


def stamps(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Size and time of each file: a sketch does not see an edit between its samples, and these tell that there was one."""
    return [((status := file.stat()).st_size, status.st_mtime_ns) for file in checkpoint.files]


def sketch(checkpoint: Checkpoint, extra: str = "") -> str:
    """sha256 over every tensor's name, dtype and shape and over samples of its bytes: quick, and equal for equal content."""
    streams = {file: file.open("rb") for file in checkpoint.files}

    def read(name: str, start: int, stop: int) -> bytes:
        info = checkpoint.tensors[name]
        streams[info.file].seek(info.start + start)
        return streams[info.file].read(stop - start)

    try:
        described = {name: (info.dtype, list(info.shape)) for name, info in checkpoint.tensors.items()}
        return sketched(described, read, extra)
    finally:
        for stream in streams.values():
            stream.close()


def sketched(
    described: Mapping[str, tuple[torch.dtype, list[int]]], read: Callable[[str, int, int], bytes], extra: str = ""
) -> str:
    """The sketch of tensors that are described by dtype and shape; read: (name, first byte, last byte) -> those bytes."""
    total = hashlib.sha256(extra.encode())
    for name in sorted(described):
        dtype, shape = described[name]
        total.update(f"{name}:{dtype}:{shape}".encode())
        size = math.prod(shape) * dtype.itemsize
        for offset in range(8):
            start = size * offset // 8
            total.update(read(name, start, start + min(512, math.ceil(size / 8))))
    return total.hexdigest()


def sketch_of_differences(shapes: Mapping[str, Sequence[int]], difference: Callable[[str, int, int], Tensor]) -> str:
    """The fingerprint that a delta of dense differences has, however they are kept. difference: (name, first, last) -> those
    entries, float32."""
    described = {name: (torch.float32, list(shapes[name])) for name in shapes}
    entries = {name: {"kind": "dense", "shape": list(shapes[name])} for name in sorted(shapes)}

    def read(name: str, start: int, stop: int) -> bytes:
        first, last = start // 4, -(-stop // 4)
        values = difference(name, first, last).contiguous()
        return bytes(values.view(torch.uint8).numpy())[start - 4 * first : stop - 4 * first]

    return sketched(described, read, json.dumps(entries, sort_keys=True))
