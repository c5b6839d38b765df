"""Files appear whole or not at all, with the mode of the user's other files, and what the disk refuses is one line."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from spunge.errors import RecipeError
from spunge.files import (
    alone,
    append_text,
    cache_folder,
    checksum,
    copied,
    disk_errors_told,
    file_of,
    read_json,
    whole_folder,
    write_json,
    write_text,
    written,
)

BIG = 1 << 20


def by_text(file: Path) -> None:
    write_text(file, "x" * BIG)


def by_json(file: Path) -> None:
    write_json(file, ["x" * BIG])


def by_torch(file: Path) -> None:
    with written(file) as aside, aside.open("wb") as stream:
        torch.save({"a": torch.zeros(BIG)}, stream)


def by_safetensors(file: Path) -> None:
    with written(file) as aside:
        safetensors.torch.save_file({"a": torch.zeros(BIG)}, aside)


def by_numpy(file: Path) -> None:
    with written(file) as aside:
        safetensors.numpy.save_file({"a": np.zeros(BIG)}, aside)


WRITERS = [by_text, by_json, by_torch, by_safetensors, by_numpy]
Writer = Callable[[Path], None]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("write", [*WRITERS, lambda file: append_text(file, "x")])
def test_a_file_has_the_mode_that_the_umask_gives(write: Writer, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "inner" / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "inner" / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["file"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """Inside, no file can grow over 100 kB: the system refuses as it does on a full disk, with another number."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [*WRITERS, lambda file: append_text(file.with_name("log"), "x" * BIG)])
def test_what_the_disk_does_not_take_leaves_the_old_file_and_one_line(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RecipeError, match=r"^--out: cannot write '.*' \(File too large\); give another folder$"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "log"}


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk that holds '.*' is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk that holds '.*' is full"),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), "the disk that holds '.*' is full"),
        (PermissionError(errno.EACCES, "Permission denied"), r"cannot write '.*file' \(Permission denied\)"),
    ],
)
def test_a_full_disk_is_told_from_a_forbidden_one(raised: Exception, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told), written(tmp_path / "file"):
        raise raised


def test_an_error_of_the_code_that_writes_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), written(tmp_path / "file"):
        raise KeyError("name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/data/rows.jsonl"),
            "^cannot read '/data/rows.jsonl' .No such file",
        ),
        (PermissionError(errno.EACCES, "Denied", b"/data/rows.jsonl"), "^cannot read '/data/rows.jsonl' .Denied"),
        (PermissionError(errno.EACCES, "Denied", "/run/delta"), "^--out: cannot use '/run/delta' .Denied"),
        (OSError(errno.EROFS, "Read-only", "/data/x"), "^--out: cannot write '/data/x' .Read-only"),
        (OSError(errno.ENOSPC, "Full"), "^--out: the disk that holds '/run' is full"),
    ],
)
def test_reading_is_told_as_reading_and_writing_as_writing(error: OSError, told: str) -> None:
    with pytest.raises(RecipeError, match=told), disk_errors_told(Path("/run")):
        raise error


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError("no tokenizer there")]
)
def test_errors_that_are_none_of_the_disk_stay_what_they_are(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, disk_errors_told(Path("/run")):
        raise error
    assert caught.value is error


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def half() -> None:
        with whole_folder(tmp_path / "out") as aside:
            (aside / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as aside:
        (aside / "file").write_text("all")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_reading_error_inside_a_folder_being_written_is_none_of_writing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^cannot read '.*rows.jsonl'"), whole_folder(tmp_path / "out"):
        (tmp_path / "rows.jsonl").read_text()


def test_one_process_at_a_time_works_in_a_folder_and_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "branches" / "a").mkdir(parents=True)
    (tmp_path / "branches" / "a" / "delta.json.1234.part").write_text("{")
    (tmp_path / "base.part").mkdir()
    (tmp_path / "kept.json").write_text("{}")
    program = (
        "import sys; from pathlib import Path; from spunge.files import alone\nwith alone(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with alone(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {".lock", "branches", "a", "kept.json"}
        second = subprocess.run(command, capture_output=True, text=True)
    assert "another process is at work in" in second.stderr
    assert subprocess.run(command).returncode == 0


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system without a lock service."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.thorough
@pytest.mark.usefixtures("no_locks")
def test_where_there_are_no_locks_a_file_stands_for_one_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(tmp_path):
        said = f"the file system of {str(tmp_path)!r} has no locks; the file .lock-held in it stands for one"
        assert caplog.messages == [said]
        with pytest.raises(RecipeError, match=r"another process is at work in .*\(if there is none, remove .lock-held"):
            alone(tmp_path).__enter__()
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.usefixtures("no_locks")
def test_a_file_that_stands_for_a_lock_holds_nothing_once_its_process_is_dead(tmp_path: Path) -> None:
    program = (
        "import os, sys; from filelock import SoftFileLock\n"
        "lock = SoftFileLock(sys.argv[1] + '/.lock-held'); lock.acquire(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (tmp_path / ".lock-held").exists()
    with alone(tmp_path):
        pass


def test_another_process_is_waited_for_as_long_as_is_asked(tmp_path: Path) -> None:
    inside = threading.Event()

    def hold() -> None:
        with alone(tmp_path):
            inside.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    with pytest.raises(RecipeError, match="another process is at work"), alone(tmp_path):
        pass
    with alone(tmp_path, patience=20.0):
        assert inside.is_set()
    holder.join()


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_lock_that_cannot_be_written_is_no_other_process(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_more: int) -> int:
        raise OSError(refused, os.strerror(refused), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RecipeError, match=r"^--out: (cannot write '.*lock'|the disk that holds .* is full)"):
        alone(tmp_path).__enter__()


MEMORY = Path("/proc/self/mem")  # its first byte cannot be read: an input/output error, as of a broken disk


@pytest.mark.skipif(not MEMORY.exists(), reason="a file of Linux")
@pytest.mark.parametrize("read", [checksum, Path.read_bytes, Path.read_text, read_json])
def test_an_error_of_reading_is_told_with_the_file_though_the_system_does_not_say_it(
    read: Callable[[Path], object],
) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(MEMORY)
    assert caught.value.filename is None
    assert file_of(caught.value) == MEMORY
    with pytest.raises(RecipeError, match=f"^cannot read '{MEMORY}' .Input/output"), disk_errors_told(Path("/run/a")):
        read(MEMORY)


def test_a_full_disk_while_a_file_is_copied_is_told_of_the_copy() -> None:
    error = OSError(errno.ENOSPC, "Full", "/data/source", None, "/run/copy")
    with (
        pytest.raises(RecipeError, match=r"^--out: the disk that holds '/run' is full"),
        disk_errors_told(Path("/run")),
    ):
        raise error


def test_a_copy_that_is_cut_off_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cached").write_text("all of it")

    def half(source: Path, target: Path) -> None:
        target.write_text("all")
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(RecipeError, match=r"the disk that holds '.*/run' is full"):
        copied(tmp_path / "cached", tmp_path / "run" / "texts.jsonl")
    assert not list((tmp_path / "run").iterdir())


def test_there_is_one_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("SPUNGE_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("SPUNGE_CACHE")
    assert cache_folder() == Path("/xdg/spunge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spunge"


def test_nothing_else_in_the_package_renames_locks_or_asks_for_the_cache() -> None:
    """One atomic write, one lock, one cache folder, one kind of temporary folder.

    A merge's own folder is renamed by merging/output.py, with its journal."""
    root = Path(__file__).parent.parent / "src" / "spunge"
    allowed = {root / "files.py", root / "temporary.py", root / "merging" / "output.py"}
    words = (
        "os.replace",
        "os.rename",
        " FileLock",
        'get("SPUNGE_CACHE',
        "XDG_CACHE_HOME",
        "NamedTemporaryFile",
        "mkstemp",
        "mkdtemp",
        "TemporaryDirectory",
    )
    odd = [
        f"{file.relative_to(root)}: {word}"
        for file in sorted(root.rglob("*.py"))
        if file not in allowed
        for word in words
        if word in file.read_text(encoding="utf-8")
    ]
    assert not odd
