"""A merge whose disk refuses something, or that is killed: one line, nothing half-written is believed, and it goes on."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from making import delta_source, noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.files import alone
from spunge.merging import engine
from spunge.merging.command import merge_command
from spunge.merging.rules import TiesSettings

CHANGED = "model.layers.1.mlp.down_proj.weight"
FORMS: dict[str, dict[str, Any]] = {
    "folder": {},
    "float32": {"settings": {"dtype": "float32"}},
    "delta": {"as_delta": True},
}
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]
NAMED = ("mkdir", "rename", "replace")  # the system says of these which file they were about
CALLS = ("replace", "rename", "fsync", "pwrite", "ftruncate", "mkdir", "copy_file_range")
Merge = Callable[[Path], Any]


@pytest.fixture(params=FORMS)
def merge(request: pytest.FixtureRequest, tmp_path: Path) -> Merge:
    """merge(out): one delta into a small checkpoint, in each form. Adapters are of scripts/faults.py: they take a model."""
    base = write_checkpoint(tmp_path / "base", weights())
    delta_source(tmp_path / "d", base, {"a.weight": noise(0, 24, 32), "b.weight": noise(1, 32, 24)})
    return lambda out: merge_command(out, str(base), [str(tmp_path / "d")], **FORMS[request.param])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Disk:
    """Counts the calls that write, and refuses one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.refused, self.error = 0, 0, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(name, vars(os)[name]))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.refused:
                raise OSError(self.error, os.strerror(self.error), *(map(str, arguments[:1]) if name in NAMED else ()))
            return call(*arguments, **options)

        return counted

    def refuse(self, number: int, error: int) -> None:
        self.count, self.refused, self.error = 0, number, error


@pytest.mark.thorough
def test_whatever_write_the_disk_refuses_it_is_one_line_and_the_same_merge_then_ends_alike(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(tmp_path / "whole")
    whole, disk = contents(tmp_path / "whole"), Disk(monkeypatch)
    merge(tmp_path / "counted")
    calls, refusals = disk.count, 0
    assert calls > 10
    for number in range(1, calls + 1):
        out, error = tmp_path / str(number), ERRORS[number % len(ERRORS)]
        disk.refuse(number, error)
        try:
            merge(out)
        except RecipeError as refused:
            told = str(refused)
            assert os.strerror(error) in told or "is full" in told
            assert "'" in told
            refusals += 1
        disk.refuse(0, 0)
        merge(out)
        assert contents(out) == whole
        assert not list(tmp_path.glob(f".{number}.*"))
    assert refusals > calls / 2  # to make a folder that is there already, for one, may be refused


def test_a_journal_whose_last_line_was_cut_short_goes_on_and_is_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written after the half line must not become part of it: the next start would read neither."""
    base = write_checkpoint(tmp_path / "base", weights())
    sources = [delta_source(tmp_path / "d", base, {name: noise(1, *value.shape) for name, value in weights().items()})]
    engine.merge(base, sources, TiesSettings(), tmp_path / "whole")
    monkeypatch.setattr(engine, "BATCH", 1)
    done: list[str] = []

    def stopping(work: Any, output: Any, fast: Any, job: Any) -> Any:
        if len(done) in (1, 3):
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(job.name)
        return merge_chunk(work, output, fast, job)

    merge_chunk = engine.merge_chunk
    monkeypatch.setattr(engine, "merge_chunk", stopping)
    journal = tmp_path / ".out.merging" / "journal.jsonl"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.merge(base, sources, TiesSettings(), tmp_path / "out")
        with journal.open("a") as stream:
            stream.write('{"tens')
    engine.merge(base, sources, TiesSettings(), tmp_path / "out")
    names = [name for name in done if name != "stopped"]
    assert len(names) == len(set(names)) == 4
    assert all(torch.equal(value, read(tmp_path / "whole")[name]) for name, value in read(tmp_path / "out").items())


def test_what_a_killed_process_left_of_a_replaced_merge_goes_with_the_next_one(merge: Merge, tmp_path: Path) -> None:
    merge(tmp_path / "out")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "model.safetensors").write_bytes(b"old")
    merge(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture
def pickled(tiny: Callable[..., Path], tmp_path: Path) -> Callable[[], Any]:
    """pickled(): merge a delta into a base whose weights are pickled, and converted beside `out`."""
    from safetensors.torch import load_file

    base, folder = tiny("llama"), tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    delta_source(tmp_path / "d", base, {CHANGED: noise(0, 32, 48, size=0.01)})
    return lambda: merge_command(tmp_path / "out", str(folder), [str(tmp_path / "d")], allow_pickle=True)


def test_a_conversion_that_a_killed_merge_left_is_made_anew(pickled: Callable[[], Any], tmp_path: Path) -> None:
    left = tmp_path / ".out.converted" / "0"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    pickled()
    assert (tmp_path / "out" / "merge.json").exists()
    assert not list(tmp_path.glob(".out*"))


def test_two_merges_do_not_convert_into_one_folder(pickled: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / ".out.converted").mkdir()
    with alone(tmp_path / ".out.converted"), pytest.raises(RecipeError, match="another process is at work in"):
        pickled()
    assert (tmp_path / ".out.converted").exists()
