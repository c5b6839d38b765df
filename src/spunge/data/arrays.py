"""Arrays with a value for each row: in memory where they are small, else in a file that is mapped and goes with the process, so
that the memory of a split does not grow with its rows."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, Any

import numpy as np

from spunge.data.mapping import give_back, mapped
from spunge.files import cache_folder, writing

IN_MEMORY = 4 << 20  # bytes of an array above which it goes to a file
AT_ONCE = 1 << 18  # rows that are looked at together

_counted = np.arange(0)


def blocks(count: int) -> Iterator[slice]:
    """All of so many rows, some at a time."""
    for start in range(0, count, AT_ONCE):
        give_back()
        yield slice(start, min(count, start + AT_ONCE))


def joined(pieces: Iterable[np.ndarray], dtype: Any) -> np.ndarray:
    """Arrays of one dimension, one after the other. Raises RecipeError where the cache folder takes no more."""
    few: list[np.ndarray] = []
    size, remaining = 0, iter(pieces)
    for piece in remaining:
        few.append(np.asarray(piece, dtype))
        size += few[-1].nbytes
        if size > IN_MEMORY:
            return _written(chain(few, remaining), np.dtype(dtype))
    return np.concatenate(few) if few else np.empty(0, dtype)


def _written(pieces: Iterable[np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
    with spare_file() as stream:
        for piece in pieces:
            with writing(cache_folder(), "SPUNGE_CACHE"):
                stream.write(np.ascontiguousarray(piece, dtype).data)
            give_back()
        with writing(cache_folder(), "SPUNGE_CACHE"):
            stream.flush()
        return np.frombuffer(mapped(stream, writable=True), dtype)  # what is mapped outlives its file


def spare_file() -> IO[bytes]:
    """A file without a name, in the cache folder. Raises RecipeError where there can be none."""
    folder = cache_folder() / "rows"
    with writing(folder, "SPUNGE_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)


def zeros(count: int, dtype: Any) -> np.ndarray:
    """As numpy's."""
    # Written out, as a file with holes would end the process where the disk is full.
    return joined((np.zeros(part.stop - part.start, dtype) for part in blocks(count)), dtype)


def counted(count: int) -> np.ndarray:
    """0, 1, 2 and so on; to be read alone, as it is one array for all who ask."""
    global _counted
    if len(_counted) < count:
        longer = joined((np.arange(part.start, part.stop) for part in blocks(count)), np.int64)
        longer.flags.writeable = False
        _counted = longer
    return _counted[:count]


def shuffled(count: int, generator: np.random.Generator) -> np.ndarray:
    """0, 1, 2 and so on in an order at random, the one that `generator.permutation(count)` holds in memory."""
    order = joined((np.arange(part.start, part.stop) for part in blocks(count)), np.int64)
    generator.shuffle(order)
    return order


def numbers_of(mask: np.ndarray) -> np.ndarray:
    """The numbers of the rows that a mask (rows,) of bool holds, ascending."""
    return joined((np.flatnonzero(mask[part]) + part.start for part in blocks(len(mask))), np.int64)


def chosen(rows: np.ndarray, mask: np.ndarray, value: bool = True) -> np.ndarray:
    """Those of some rows' numbers for which a mask of all rows has a value."""
    return joined((rows[part][mask[rows[part]] == value] for part in blocks(len(rows))), np.int64)


def dealt(count: int, cuts: Sequence[int] | np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """0, 1, 2 and so on, dealt out at random: shuffled, cut before these places, ascending in each piece."""
    pieces = np.split(shuffled(count, generator), cuts)
    for piece in pieces:
        piece.sort()
    return pieces


def picked(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Some values, by their places in that order."""
    return joined((values[places[part]] for part in blocks(len(places))), values.dtype)


def count_of(rows: np.ndarray, mask: np.ndarray) -> int:
    """For how many of some rows' numbers a mask of all rows is true."""
    return sum(int(np.count_nonzero(mask[rows[part]])) for part in blocks(len(rows)))


def mark(mask: np.ndarray, rows: np.ndarray) -> None:
    """Make a mask true at some rows' numbers."""
    for part in blocks(len(rows)):
        mask[rows[part]] = True


def among(rows: np.ndarray, ascending: np.ndarray) -> np.ndarray:  # (rows,) of bool
    """Which numbers are among others, which ascend: numpy's isin sorts all of both, in memory."""
    if not len(ascending):
        return np.zeros(len(rows), dtype=bool)
    at = np.minimum(np.searchsorted(ascending, rows), len(ascending) - 1)
    return np.asarray(ascending[at] == rows)
