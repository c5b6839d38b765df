"""Which of some digests are among others, by millions: dealt out by their bits into files, each of which the memory holds."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spunge.data.arrays import spare_file, zeros
from spunge.data.mapping import give_back
from spunge.files import cache_folder, writing

TOGETHER = 1 << 19  # digests that are compared at once
MOST = 256  # files on either side, which are open together

_Pieces = Iterable[np.ndarray]  # (n, 2) of uint64 each


def are_among(own: _Pieces, others: _Pieces, own_count: int, other_count: int) -> np.ndarray:  # (own,) of bool
    """Which of own digests is among the others. Raises RecipeError where the cache folder takes no more."""
    result = zeros(own_count, bool)
    if not own_count or not other_count:
        return result
    files = min(MOST, 1 + (own_count + other_count) // TOGETHER)
    if files == 1:
        result[:] = _among(np.concatenate([*own]), np.concatenate([*others]))
        return result
    with ExitStack() as opened:
        mine, theirs = ([opened.enter_context(spare_file()) for _ in range(files)] for _ in range(2))
        _deal(_numbered(own), mine)
        _deal(others, theirs)
        for left, right in zip(mine, theirs, strict=True):
            numbered = _read(left, 3)
            result[numbered[:, 2]] = _among(numbered[:, :2], _read(right, 2))
    return result


def _numbered(pieces: _Pieces) -> Iterator[np.ndarray]:  # of (n, 3)
    """With each digest's place behind it."""
    before = 0
    for piece in pieces:
        yield np.column_stack([piece, np.arange(before, before + len(piece), dtype=np.uint64)])
        before += len(piece)


def _deal(pieces: _Pieces, files: list[IO[bytes]]) -> None:
    for piece in pieces:
        give_back()
        bucket = piece[:, 0] % np.uint64(len(files))
        order = np.argsort(bucket, kind="stable")
        cuts = np.searchsorted(bucket[order], np.arange(1, len(files), dtype=np.uint64))
        with writing(cache_folder(), "SPUNGE_CACHE"):
            for file, lines in zip(files, np.split(piece[order], cuts), strict=True):
                file.write(lines.tobytes())


def _read(file: IO[bytes], width: int) -> np.ndarray:  # (n, width)
    file.seek(0)
    return np.frombuffer(file.read(), np.uint64).reshape(-1, width)


def _among(own: np.ndarray, others: np.ndarray) -> np.ndarray:  # (n, 2), (m, 2) -> (n,) of bool
    return np.asarray(pc.is_in(_array(own), value_set=_array(others)).to_numpy(zero_copy_only=False))


def _array(digests: np.ndarray) -> pa.Array:
    kind = pa.binary(16)
    return pa.Array.from_buffers(kind, len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests).tobytes())])
