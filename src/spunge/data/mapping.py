"""Files that are mapped: what is read of them becomes memory of this process until it is given back."""

import mmap
import time
import weakref
from typing import IO

EVERY = 0.1  # seconds: giving back takes some milliseconds

_maps: list[weakref.ref[mmap.mmap]] = []
_last = time.monotonic()


def mapped(stream: IO[bytes], writable: bool = False) -> mmap.mmap:
    """A whole file, which may be closed then. Raises OSError for one that cannot be mapped, such as an empty one."""
    try:
        whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except ValueError as error:
        raise OSError(str(error)) from error
    _maps[:] = [*(each for each in _maps if each() is not None), weakref.ref(whole)]
    return whole


def give_back() -> None:
    """Where it was not done just now, give the system back the memory of what was read of mapped files: whoever passes over all
    rows calls it again and again. What is read again comes from the system's cache, or the disk."""
    global _last
    if time.monotonic() - _last < EVERY:
        return
    _last = time.monotonic()
    for each in [*_maps]:
        whole = each()
        if whole is not None:
            whole.madvise(mmap.MADV_DONTNEED)
