"""Copy files, or parts of them, by the kernel: shared blocks where the file system can, no trip through Python."""

import errno
import os
import shutil
import sys
from pathlib import Path

from spunge.files import PART, about
from spunge.weights.checkpoint import Checkpoint

FICLONE = 0x40049409  # Linux ioctl: let a file share another's blocks (btrfs, xfs, bcachefs)
PIECE = 1 << 30
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY, errno.EBADF}


def clone(source: Path, target: Path) -> bool:
    """Make target share source's blocks; False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        return True
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise


def shares_blocks(base: Checkpoint, folder: Path) -> bool:
    """Whether a copy of the base in `folder` takes no room: the file system lets it share the base's blocks."""
    probe = folder / f"probe{PART}"
    try:
        return clone(base.files[0], probe)
    finally:
        probe.unlink(missing_ok=True)


def copy_range(reader: int, writer: int, start: int, stop: int, to: int) -> None:
    """Copy bytes start..stop of one open file to the place `to` of another. Raises OSError; EOFError where the source ends.

    What is a hole in both files stays one: it reads as zeros there as here, and takes no room.
    """
    at, shift = start, to - start
    while at < stop:
        try:
            at = _past_hole(reader, writer, at, stop, shift)
            if at >= stop:
                break
            ends = _next(reader, at, stop, os.SEEK_HOLE)
            done = os.copy_file_range(reader, writer, min((ends if ends > at else stop) - at, PIECE), at, at + shift)
        except AttributeError:  # not Linux
            break
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break
        if not done:
            break
        at += done
    while at < stop:
        piece = os.pread(reader, min(stop - at, 1 << 22), at)
        if not piece:
            raise EOFError(f"the file ends at byte {at}, {stop} expected")
        write_all(writer, memoryview(piece), at + shift)
        at += len(piece)


def _past_hole(reader: int, writer: int, at: int, stop: int, shift: int) -> int:
    """The first byte from `at` on that is in no hole of the source, or that the target has bytes at."""
    data = _next(reader, at, stop, os.SEEK_DATA)
    return data if data == at else min(data, _next(writer, at + shift, stop + shift, os.SEEK_DATA) - shift)


def _next(handle: int, at: int, stop: int, what: int) -> int:
    """The next byte of a kind (os.SEEK_DATA, os.SEEK_HOLE) before `stop`, else `stop`; `at` where the file system can't say."""
    try:
        return min(stop, os.lseek(handle, at, what))
    except OSError as error:
        if error.errno == errno.ENXIO:  # none up to the end of the file
            return stop if at < os.fstat(handle).st_size else at
        if error.errno in _CANNOT:
            return at
        raise


def write_all(writer: int, data: memoryview, at: int) -> None:
    """pwrite until everything is written."""
    while data:
        done = os.pwrite(writer, data, at)
        data, at = data[done:], at + done


def copy_file(source: Path, target: Path) -> None:
    """A whole file: shared blocks, else a kernel copy. It gets the mode of a new file, whatever the source's."""
    target.unlink(missing_ok=True)  # it may be another file under a second name
    if not clone(source, target):
        with about(target), source.open("rb") as reader, target.open("wb") as writer:
            copy_range(reader.fileno(), writer.fileno(), 0, os.fstat(reader.fileno()).st_size, 0)


def share(source: Path, target: Path) -> None:
    """A file under a second name, without a second copy of its bytes where the file system can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be another file under a second name, which would be emptied with it
    if clone(source, target):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
