"""The merged checkpoint while it is written: aside, in the base's own layout, with a journal of what is finished."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import LOCK, alone, append_text, disk_errors_told, fingerprint, read_json, write_json, write_text
from spunge.merging.card import merge_card
from spunge.merging.copying import clone, copy_range, write_all
from spunge.merging.folder import check_folder, copy_rest, write_index
from spunge.merging.outcome import MergeReport, Tally
from spunge.weights.checkpoint import Checkpoint

REPORT = "merge.json"
PIECE = 1 << 27  # bytes


class Output:
    """Writes OUT. Raises RecipeError when it cannot be written, or holds something that no merge wrote."""

    def __init__(self, base: Checkpoint, out: Path, labels: Sequence[str], changed: Sequence[str], key: Any) -> None:
        self.base = base
        self.out = out.resolve()  # what a link leads to is replaced, not the link
        self.changed = frozenset(changed)
        self.aside = self.out.with_name(f".{self.out.name}.merging")
        self.key = fingerprint({"inputs": key, "labels": list(labels), "base": [stamp(file) for file in base.files]})
        self.done: dict[str, Tally] = {}
        self.facts: dict[str, Tensor] = {}
        self._copied: set[str] = set()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="copy")
        self._copying: list[Future[None]] = []
        self._stopped = threading.Event()

    def earlier(self) -> MergeReport | None:
        """The report of this very merge, where it has been made before. Raises RecipeError for a foreign folder."""
        if not self.out.exists():
            return None
        if not self.out.is_dir() or (any(self.out.iterdir()) and not (self.out / REPORT).exists()):
            raise RecipeError(f"--out: {str(self.out)!r} exists and no merge wrote it; give another folder")
        content = read_json(self.out / REPORT)
        whole = isinstance(content, dict) and content.get("key") == self.key
        if not whole or not all((self.out / file.name).exists() for file in self.base.files):
            return None
        return MergeReport.from_json(content)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take up an interrupted merge of the same inputs or begin; close the files at the end."""
        try:
            with disk_errors_told(self.aside):
                self.aside.mkdir(parents=True, exist_ok=True)
                with alone(self.aside):
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
        lines = _lines(self.aside / "journal.jsonl")
        if lines[:1] != [{"key": self.key}]:
            for left in self.aside.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            self._note({"key": self.key})
        for line in lines[1:] if lines[:1] == [{"key": self.key}] else []:
            if "tensor" in line:
                self.done[line["tensor"]] = Tally.load(line)
            elif "facts" in line:
                self.facts = {name: torch.tensor(value, dtype=torch.float64) for name, value in line["facts"].items()}
            elif "copied" in line:
                self._copied.add(line["copied"])
        self._require_space()

    def _require_space(self) -> None:
        wanted = sum(file.stat().st_size for file in self.base.files)
        there = sum(file.stat().st_blocks * 512 for file in self.aside.iterdir())
        free = shutil.disk_usage(self.aside).free
        if wanted - there > free and not self._shares_blocks():
            raise OSError(errno.ENOSPC, f"{(wanted - there) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def _shares_blocks(self) -> bool:
        probe = self.aside / "probe"
        shared = clone(self.base.files[0], probe)
        probe.unlink(missing_ok=True)
        return shared

    def _copy_unchanged(self) -> None:
        """Start copying what no branch changed, beside the arithmetic: the kernel does it, and the disk is the limit."""
        for file in self.base.files:
            target = self.aside / file.name
            touched = sorted(
                (info.start, info.stop)
                for info in self.base.tensors.values()
                if info.file == file and info.name in self.changed
            )
            if file.name not in self._copied:
                shared = not target.exists() and clone(file, target)
                if not shared:
                    _reserve(target, file.stat().st_size)
                self._copying.append(
                    self._copiers.submit(self._copy_around, file, target, [] if shared else touched, shared)
                )
            if touched:
                self._files[file] = os.open(target, os.O_RDWR)

    def _copy_around(self, file: Path, target: Path, touched: Sequence[tuple[int, int]], shared: bool) -> None:
        """Everything but the `touched` ranges, in pieces, so that a merge that stops does not wait for the whole file."""
        size = file.stat().st_size
        at = size if shared else 0
        with file.open("rb") as reader, target.open("r+b") as writer:
            for start, stop in [*touched, (size, size)]:
                while at < start and not self._stopped.is_set():
                    piece = min(start, at + PIECE)
                    copy_range(reader.fileno(), writer.fileno(), at, piece)
                    at = piece
                at = max(at, stop)
        if not self._stopped.is_set():
            self._note({"copied": file.name})

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Entries from `start` on of a changed tensor, in the base's dtype."""
        info = self.base.tensors[name]
        data = memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        write_all(self._files[info.file], data, info.start + start * info.dtype.itemsize)

    def note_facts(self, facts: dict[str, Tensor]) -> None:
        self._note({"facts": {name: value.double().tolist() for name, value in facts.items()}})

    def note_done(self, name: str, tally: Tally) -> None:
        self.done[name] = tally
        self._note({"tensor": name, **tally.dump()})

    def _note(self, line: dict[str, Any]) -> None:
        with self._lock:
            append_text(self.aside / "journal.jsonl", json.dumps(line) + "\n")

    def finish(self, report: MergeReport) -> MergeReport:
        """Everything but weights from the base's folder, the index, the report and the model card; then the rename.

        Returns the report with what the check of the whole folder says. Raises RecipeError where transformers would load
        something else than was written.
        """
        for copied in self._copying:
            copied.result()
        copy_rest(self.base.folder, self.aside, self.out)
        write_index(self.base.folder, self.aside)
        report = replace(report, checked=check_folder(self.aside, self.base.folder, self.base.tensors))
        write_text(self.aside / "README.md", merge_card(report, self.base.folder))
        write_json(self.aside / REPORT, report.to_json())
        for own in ("journal.jsonl", LOCK):
            (self.aside / own).unlink()
        _replace_folder(self.aside, self.out)
        return report


def _reserve(target: Path, size: int) -> None:
    """A file of the final size to write into; what an interrupted merge wrote there stays."""
    handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def _replace_folder(new: Path, old: Path) -> None:
    if not old.exists():
        os.rename(new, old)
        return
    gone = old.with_name(f".{old.name}.replaced")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(old, gone)
    os.rename(new, old)
    shutil.rmtree(gone)


def stamp(file: Path) -> list[Any]:
    """What changes when a file does: cheap, for deciding whether an interrupted merge may go on."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _lines(file: Path) -> list[Any]:
    """The journal's whole lines; the last may be cut short."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
