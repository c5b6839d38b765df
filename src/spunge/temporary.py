"""Folders for files that are of no use once their process is gone, in the system's folder for temporary files.

Each holds a lock for as long as its process lives, which the system takes back whatever ends it. So a process that was killed, and
removes nothing, leaves a folder that the next one knows as nobody's, and removes.
"""

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from spunge.files import given_name, taken

if TYPE_CHECKING:
    from filelock import BaseFileLock

PREFIX = "spunge-"
LOCK = ".owned"


class TemporaryFolder:
    """A new folder, that goes when it is closed, at the end of a `with` block, or with the process."""

    def __init__(self, kind: str) -> None:
        """kind: for people who look into the system's folder, and wonder."""
        remove_left()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-"))
        self._close = weakref.finalize(self, _removed, self.path, _owned(self.path))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._close()


def _owned(folder: Path) -> "BaseFileLock | None":
    """The lock of a new folder; None where the disk takes none: then nobody removes the folder but its own process."""
    # Another process looks at the name, and finds the lock taken from the first.
    aside = folder / f"{LOCK}-soon"
    try:
        lock = taken(aside, 0)
        given_name(aside, folder / LOCK)
    except OSError:
        return None
    return lock


def _removed(folder: Path, lock: "BaseFileLock | None") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        with suppress(OSError):
            lock.release()


def remove_left() -> None:
    """Remove the folders of this user whose processes are gone. One that cannot be removed stays."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / LOCK).is_file():
                continue
            if (lock := taken(folder / LOCK, 0)) is not None:
                _removed(folder, lock)
