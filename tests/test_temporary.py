"""Temporary folders go with their process, however that ends."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spunge.temporary import TemporaryFolder, remove_left

PROGRAM = """
import time
from spunge.temporary import TemporaryFolder
folder = TemporaryFolder("test")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_has_stays(place: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    (theirs / "1").mkdir()
    other = place / "spunge-of-another-program"
    other.mkdir()
    (place / "spunge-link").symlink_to(theirs)
    with TemporaryFolder("mine") as mine:
        remove_left()
        assert mine.is_dir()
        assert (theirs / "1").is_dir()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (theirs / "1").is_dir()
        remove_left()
        assert not theirs.exists()
    assert not mine.exists()
    assert {path.name for path in place.iterdir()} == {other.name, "spunge-link"}


def test_one_that_nobody_closes_goes_with_its_process(place: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM.replace("sleep(60)", "sleep(0)")], check=True, capture_output=True)
    assert not list(place.iterdir())
