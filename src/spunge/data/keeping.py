"""Rows that were read: small tables in memory, large ones in a file of the cache that is mapped, so that memory stays flat.

What is kept is named by the content of the file that it was read from, never by its path or time: rows are those of the file
as it is now.
"""

import contextlib
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from spunge.data.mapping import give_back, mapped
from spunge.data.tables import taken
from spunge.files import cache_folder, checksum, fingerprint, writing, written

VERSION = 1  # rises when the same file gives other rows
IN_MEMORY = 64 << 20  # bytes of a table above which it goes to a file
RECENT = 4  # tables that one process keeps at hand
AT_ONCE = 1 << 15  # rows that are taken out of a table at a time
SPILL = ".spill"  # ends the name of a folder for what a query puts aside
DAYS = 30  # after which a file that nobody read is removed

_numbers = count()
_recent: OrderedDict[str, pa.Table] = OrderedDict()
_mapped_here: set[str] = set()  # keys of the tables that this process took from a file


class Keeper:
    """Takes tables of one schema, one after the other. Use as a context; `table` is all of them together."""

    def __init__(self, file: Path, in_memory: int | None = None) -> None:
        self._file = file
        self._in_memory = IN_MEMORY if in_memory is None else in_memory
        self._whole = contextlib.ExitStack()  # when it closes, the file has its name
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._writer: pa.RecordBatchFileWriter | None = None
        self.rows = 0

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:  # not all rows were given: nothing is kept
            self._writer.close()
            self._whole.__exit__(RuntimeError, RuntimeError("rows are missing"), None)

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self._bytes += table.nbytes
        if self._writer is None and self._bytes <= self._in_memory:
            self._tables.append(table)
            return
        with writing(self._file, "SPUNGE_CACHE"):
            if self._writer is None:
                aside = self._whole.enter_context(written(self._file, "SPUNGE_CACHE"))
                self._writer = pa.ipc.new_file(str(aside), table.schema)
            for each in (*self._tables, table):
                self._writer.write_table(each)
        give_back()
        self._tables.clear()

    def table(self) -> pa.Table:
        if self._writer is None:
            return pa.concat_tables(self._tables) if self._tables else pa.table({})
        self._writer.close()
        self._writer = None
        self._whole.close()
        return _mapped(self._file)


def table_of(key: str, make: Callable[[Callable[[], Keeper]], pa.Table]) -> pa.Table:
    """The table that `make` gives, or an earlier one of the same key. `make` is handed what gives it Keepers."""
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    file = cache_folder() / "rows" / f"{key}.arrow"
    try:
        table = _mapped(file)
        os.utime(file)
    except (OSError, pa.ArrowException):
        table = make(lambda: Keeper(file))
        _tidy(file.parent)
    if file.exists():
        _mapped_here.add(key)
    _recent[key] = table
    while len(_recent) > RECENT:
        _recent.popitem(last=False)
    return table


def together(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of one schema, one after the other; where they are large, in a file that goes with this process."""
    file = cache_folder() / "rows" / f"{os.getpid()}-{next(_numbers)}.arrow"
    with Keeper(file, IN_MEMORY // 16) as keeper:  # of many parts
        for each in tables:
            keeper.add(each)
        table = keeper.table()
    file.unlink(missing_ok=True)  # what is mapped stays readable
    return table


def taken_apart(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The rows with these numbers, in this order, taken some thousands at a time: the memory may not hold all of them."""
    return together(taken(table, rows[start : start + AT_ONCE]) for start in range(0, max(1, len(rows)), AT_ONCE))


def spills(table: pa.Table) -> bool:
    """Whether what is made of all rows of a table at once is to lie on the disk: it is one that does not stay in memory."""
    return bool(table.nbytes > IN_MEMORY)


def spill_folder() -> Path:
    """A folder that is not there yet, in the cache folder, for what a query puts aside. DuckDB makes it, and removes it when the
    query's connection closes. Raises RecipeError where there can be none."""
    folder = cache_folder() / "rows"
    with writing(folder, "SPUNGE_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        for left in folder.glob(f"*{SPILL}"):  # of a process that was killed: no query takes so long
            if left.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(left, ignore_errors=True)
    return folder / f"{os.getpid()}-{os.urandom(4).hex()}{SPILL}"


def rows_files() -> frozenset[str]:
    """Keys of the tables in the cache that this process has used."""
    return frozenset(_mapped_here)


def cached_rows(key: str) -> Iterator[Path]:
    """The files of the cache that hold a table, whole or in part. A key that is none names nothing."""
    if re.fullmatch(r"[0-9a-f]{64}", key):
        yield from (cache_folder() / "rows").glob(f"{key}.arrow*")


def content_key(file: Path, *options: object) -> str:
    """Of a file's bytes and of all else that its rows depend on."""
    return fingerprint([VERSION, checksum(file), *options])


def _mapped(file: Path) -> pa.Table:
    with file.open("rb") as stream:
        return pa.ipc.open_file(pa.py_buffer(mapped(stream))).read_all()


def _tidy(folder: Path) -> None:
    """Remove what nobody read for long. A table in use stays readable until it is let go."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.arrow*"):
            if file.stat().st_mtime < time.time() - DAYS * 86400:
                file.unlink(missing_ok=True)
