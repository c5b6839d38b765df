"""The merged checkpoint while it is written: aside, in the base's own files, with a journal of what is finished."""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spunge.errors import redacted
from spunge.files import (
    HELD,
    LOCK,
    about,
    alone,
    append_text,
    disk_errors_told,
    put_in_place,
    require_space,
    write_json,
    write_text,
)
from spunge.merging.card import merge_card
from spunge.merging.copying import clone, copy_range, shares_blocks, write_all
from spunge.merging.description import describe
from spunge.merging.earlier import REPORT, earlier, unfinished, weight_files
from spunge.merging.folder import check_folder, copy_rest, write_index
from spunge.merging.layout import FileLayout, check_finite, laid_out
from spunge.merging.outcome import MergeReport, Tally
from spunge.weights.header import TensorInfo, read_header
from spunge.weights.sources import Mapped

JOURNAL = "journal.jsonl"
PIECE = 1 << 27  # bytes
CONVERTED = 1 << 22  # entries that are converted at once


class Output:
    """Writes OUT. Raises RecipeError when it cannot be written.

    key: fingerprint of the inputs; dtypes: what each of the base's tensors is written in; dtype: what was asked for, base or
    a name; replace: whether another merge at OUT may go.
    """

    def __init__(
        self,
        mapped: Mapped,
        out: Path,
        changed: Sequence[str],
        key: str,
        dtypes: Mapping[str, torch.dtype],
        dtype: str,
        replace: bool,
    ) -> None:
        self.mapped = mapped
        self.base = base = mapped.checkpoint
        self.out = out.resolve()  # what a link leads to is replaced, not the link
        self.dtype = dtype
        self.layouts = laid_out(base, dtypes)
        inside = {layout.source: layout.tensors for layout in self.layouts}
        self.names = {layout.source: layout.name for layout in self.layouts}
        self.places = {name: inside[info.file][name] for name, info in base.tensors.items()}
        self.changed = frozenset(changed)
        self.aside = unfinished(self.out)
        self.key, self.replace = key, replace
        self.done: dict[str, Tally] = {}
        self.facts: dict[str, Tensor] = {}
        self._copied: set[str] = set()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="copy")
        self._copying: list[Future[None]] = []
        self._stopped = threading.Event()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take up an interrupted merge of the same inputs or begin; close the files at the end."""
        try:
            with disk_errors_told(self.aside):
                self.aside.mkdir(parents=True, exist_ok=True)
                with alone(self.aside):
                    earlier(self.out, self.key, self.replace)  # what another process put there meanwhile
                    self._begin()
                    self._copy_unchanged()
                    yield
        finally:
            self._stopped.set()
            self._copiers.shutdown(cancel_futures=True)
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()

    def _begin(self) -> None:
        journal = self.aside / JOURNAL
        lines = _lines(journal)
        if lines[:1] != [{"key": self.key}]:
            lines = [{"key": self.key}]
            for left in self.aside.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name not in (LOCK, HELD):
                    left.unlink()
        write_text(
            journal, "".join(map(_line, lines))
        )  # without one that was cut short: what comes next is a line of its own
        for line in lines[1:]:
            if "tensor" in line:
                self.done[line["tensor"]] = Tally.load(line["tally"])
            elif "facts" in line:
                self.facts = {name: torch.tensor(value, dtype=torch.float64) for name, value in line["facts"].items()}
            elif "copied" in line:
                self._copied.add(line["copied"])
        self._require_space()

    def _require_space(self) -> None:
        wanted = sum(self._room(layout) for layout in self.layouts)
        there = sum(file.stat().st_blocks * 512 for file in self.aside.rglob("*"))
        if any(layout.header is not None for layout in self.layouts) or not shares_blocks(self.base, self.aside):
            require_space(self.aside, wanted - there, "the merged model")

    def _room(self, layout: FileLayout) -> int:
        """Bytes that a file takes at the most: holes of the base's are none, but where a tensor is merged into them."""
        if layout.header is not None:
            return layout.size
        merged = sum(info.stop - info.start for name, info in layout.tensors.items() if name in self.changed)
        return min(layout.size, layout.source.stat().st_blocks * 512 + merged)

    def _copy_unchanged(self) -> None:
        """Start copying what no branch changed, beside the arithmetic: the kernel does it, and the disk is the limit."""
        for layout in self.layouts:
            file, target = layout.source, self.aside / layout.name
            touched = [
                info for name, info in layout.tensors.items() if self.places[name] is info and name in self.changed
            ]
            target.parent.mkdir(parents=True, exist_ok=True)
            if layout.name not in self._copied:
                shared = layout.header is None and not target.exists() and clone(file, target)
                if not shared:
                    _reserve(target, layout.size)
                self._copying.append(self._copiers.submit(self._copy_around, layout, target, touched, shared))
            if touched:
                self._files[file] = os.open(target, os.O_RDWR)

    def _copy_around(self, layout: FileLayout, target: Path, touched: Sequence[TensorInfo], shared: bool) -> None:
        """Everything but the `touched` tensors, in pieces, so that a merge that stops does not wait for the whole file."""
        with about(target):
            if layout.header is not None:
                self._convert(layout, target, touched)
            elif not shared:
                self._copy_between(layout, target, touched)
        if not self._stopped.is_set():
            self._note({"copied": layout.name})

    def _copy_between(self, layout: FileLayout, target: Path, touched: Sequence[TensorInfo]) -> None:
        with layout.source.open("rb") as reader, target.open("r+b") as writer:
            at = 0
            for start, stop in [*sorted((info.start, info.stop) for info in touched), (layout.size, layout.size)]:
                self._copy(reader.fileno(), writer.fileno(), at, start, at)
                at = max(at, stop)

    def _copy(self, reader: int, writer: int, start: int, stop: int, to: int) -> None:
        while start < stop and not self._stopped.is_set():
            piece = min(stop, start + PIECE)
            copy_range(reader, writer, start, piece, to)
            start, to = piece, to + piece - start

    def _convert(self, layout: FileLayout, target: Path, touched: Sequence[TensorInfo]) -> None:
        """A file whose tensors take another dtype: a header of its own, and every tensor that is not merged."""
        merged = {info.name for info in touched}
        with layout.source.open("rb") as reader, target.open("r+b") as writer:
            write_all(writer.fileno(), memoryview(layout.header or b""), 0)
            for before in read_header(layout.source):
                after = layout.tensors[before.name]
                if before.name in merged:
                    continue
                if after.dtype == before.dtype:
                    self._copy(reader.fileno(), writer.fileno(), before.start, before.stop, after.start)
                    continue
                values = self.mapped.view_of(before)
                for start in range(0, before.numel, CONVERTED):
                    if self._stopped.is_set():
                        return
                    piece = values[start : start + CONVERTED].to(after.dtype)
                    check_finite(before.name, piece, after.dtype)
                    write_all(writer.fileno(), _bytes_of(piece), after.start + start * after.dtype.itemsize)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Entries from `start` on of a changed tensor, in the dtype that it is to have."""
        info = self.places[name]
        with about(self.aside / self.names[info.file]):
            write_all(self._files[info.file], _bytes_of(values), info.start + start * info.dtype.itemsize)

    def note_facts(self, facts: dict[str, Tensor]) -> None:
        self._note({"facts": {name: value.double().tolist() for name, value in facts.items()}})

    def note_done(self, name: str, tally: Tally) -> None:
        self.done[name] = tally
        self._note({"tensor": name, "tally": tally.dump()})

    def _note(self, line: dict[str, Any]) -> None:
        with self._lock:
            append_text(self.aside / JOURNAL, _line(line))

    def finish(self, report: MergeReport) -> MergeReport:
        """Everything but weights from the base's folder, the index, the report and the model card; then the rename.

        Returns the report with what the check of the whole folder says. Raises RecipeError where transformers would load
        something else than was written.
        """
        for copied in self._copying:
            copied.result()
        copy_rest(self.base.folder, self.aside, self.out)
        write_index(self.base.folder, self.aside)
        told = describe(self.aside, self.dtype)
        checked = check_folder(self.aside, self.base.folder, self.places)
        report = replace(report, checked=checked, files=weight_files(self.aside), notes=[*report.notes, *told])
        write_text(self.aside / "README.md", redacted(merge_card(report, self.base.folder)))
        write_json(self.aside / REPORT, report.to_json())
        for own in (JOURNAL, LOCK, HELD):
            (self.aside / own).unlink(missing_ok=True)
        put_in_place(self.aside, self.out)
        return report


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _reserve(target: Path, size: int) -> None:
    """A file of the final size to write into; what an interrupted merge wrote there stays."""
    handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with about(target):
            os.ftruncate(handle, size)
    finally:
        os.close(handle)


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"


def _lines(file: Path) -> list[Any]:
    """The journal's whole lines; the last may be cut short."""
    if not file.exists():
        return []
    whole_lines = []
    for line in file.read_text().splitlines():
        try:
            whole_lines.append(json.loads(line))
        except ValueError:
            break
    return whole_lines
