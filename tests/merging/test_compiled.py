"""Where numba cannot be used, a merge takes longer, says so once, and writes the same bytes."""

import errno
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spunge.merging.fast
from making import noise, write_checkpoint
from spunge.merging.engine import merge
from spunge.merging.fast import compiled
from spunge.merging.rules import TiesSettings
from spunge.weights.opening import open_source

numba = pytest.importorskip("numba")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models of it, in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    tensors = {"large.weight": noise(0, 300, 512).bfloat16(), "small.weight": noise(1, 64).bfloat16()}
    changed = [
        {name: (tensor + noise(7 * i, *tensor.shape, size=0.02)).bfloat16() for name, tensor in tensors.items()}
        for i in (1, 2)
    ]
    return [write_checkpoint(folder / f"m{i}", content) for i, content in enumerate([tensors, *changed])]


def merged(models: list[Path], out: Path, **options: bool) -> bytes:
    base, *others = models
    merge(base, [open_source(each, base) for each in others], TiesSettings(density=0.3), out, **options)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not merged yet; what is tried inside is forgotten again."""
    monkeypatch.delitem(sys.modules, "spunge.merging.fast.kernels", raising=False)
    monkeypatch.delattr(spunge.merging.fast, "kernels", raising=False)
    compiled.usable.cache_clear()
    yield
    compiled.usable.cache_clear()


def is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)


def is_not_for_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba asks for this when it is imported, and raises no ImportError."""

    class Newer:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("Cannot install on Python version 3.99.0")

    monkeypatch.setitem(sys.modules, "numba", Newer())


def does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.dispatcher import Dispatcher
    from numba.core.errors import LoweringError

    def compile_(self: object, sig: object) -> None:
        raise LoweringError("LLVM ERROR: Symbol not found: __svml_sqrtf8")

    monkeypatch.setattr(Dispatcher, "compile", compile_)


def finds_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only installation, and no home that can be written: the test that numba itself makes of a folder fails."""
    from numba.core import caching

    def forbidden(dir: object = None, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(caching.tempfile, "TemporaryFile", forbidden)


def cannot_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    def full(self: object, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "load", lambda self, key: None)
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)


def gives_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from spunge.merging.fast import kernels

    monkeypatch.setattr(kernels, "count_keys", lambda *arguments: (0, 0))


WAYS = [is_missing, is_not_for_this_python, does_not_compile, finds_no_folder, cannot_store, gives_wrong_numbers]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("way", WAYS)
def test_without_a_usable_numba_the_same_bytes_are_written_and_it_is_said_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way
) -> None:
    plain = merged(models, tmp_path / "plain", compiled=False)
    assert not caplog.records
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "spunge"):
        way(patch)
        first, second = merged(models, tmp_path / "first"), merged(models, tmp_path / "second")
    assert first == second == plain
    [said] = [record.getMessage() for record in caplog.records if record.name == "spunge"]
    assert said.startswith("merging without numba, several times slower and with the same result: ")
    assert "\n" not in said
    assert len(said) <= 300


@pytest.mark.usefixtures("afresh")
def test_what_is_tried_is_what_is_used(models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every kernel is compiled by the trial, for the types with which a merge calls it, so that no later call can fail."""
    assert compiled.usable()
    from spunge.merging.fast import kernels

    before = {name: list(getattr(kernels, name).signatures) for name in ("ties", "count_keys", "sample_keys")}
    compiled_bytes = merged(models, tmp_path / "compiled")
    assert {name: list(getattr(kernels, name).signatures) for name in before} == before
    assert all(len(signatures) == 1 for signatures in before.values())
    assert compiled_bytes == merged(models, tmp_path / "plain", compiled=False)
    assert not [record for record in caplog.records if record.name == "spunge"]
