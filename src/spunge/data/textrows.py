"""Rows of text files: CSV, whose cells are all text, and plain text, a row a line. Read a few MB at a time."""

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from spunge.data.decoding import UnreadableError, open_text
from spunge.data.keeping import Keeper
from spunge.data.kinds import TEXT

CHUNK = 1 << 24  # characters of a table at a time
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
LOOKED_AT = 1000  # rows that decide between two delimiters


def read_lines(file: Path, encoding: str | None, keeper: Callable[[], Keeper]) -> pa.Table:
    """A row for each line, in the column `text`. Raises UnreadableError."""
    with keeper() as kept, open_text(file, encoding, None) as stream:
        while lines := stream.readlines(CHUNK):
            kept.add(pa.table({"text": pa.array([line.removesuffix("\n") for line in lines], TEXT)}))
        return kept.table()


def read_csv(
    file: Path, ending: str, encoding: str | None, delimiter: str | None, keeper: Callable[[], Keeper]
) -> pa.Table:
    """The rows as Python's csv module reads them. Every cell is text; an empty one is null. Raises UnreadableError.

    The delimiter is the one that parts the heading, where none is given.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells of more than 128 KB
    mark = delimiter or ("\t" if ending == ".tsv" else _delimiter(file, encoding))
    with keeper() as kept, open_text(file, encoding, "") as stream:
        rows = _records(stream, mark)
        names = _named(next(rows, []))
        for chunk in _chunks(rows):
            columns = [pa.array([cell or None for cell in cells], TEXT) for cells in zip(*chunk, strict=True)]
            kept.add(pa.table(columns, names=names))
        return kept.table()


def _records(stream: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """The heading and the rows, blank lines left out. Raises UnreadableError for a row that has not as many cells."""
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    number, width = -1, 0
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"row {number + 1}" if number >= 0 else "the heading"
            raise UnreadableError(f"{where} (before line {reader.line_num + 1}): {_told(error)}") from None
        if not record or (number < 0 and width == 0 and record == ["sep=", ""]):
            continue
        number += 1
        width = width or len(record)
        if len(record) != width:
            raise UnreadableError(
                f"row {number} (line {reader.line_num}) has {len(record)} cells and the heading {width}; "
                f"write a cell that holds {DELIMITERS.get(delimiter, repr(delimiter))} in double quotes"
            )
        yield record


def _told(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text:
        return "a double quote is opened and never closed"
    if "expected after" in text:
        return f"{text}; write a double quote inside a quoted cell twice"
    return text


def _named(heading: list[str]) -> list[str]:
    """The columns' names. One without a name, as pandas writes its index, is called `Unnamed: 0` after where it stands."""
    names = [name or f"Unnamed: {number}" for number, name in enumerate(heading)]
    for name in names:
        if names.count(name) > 1:
            raise UnreadableError(f"two of its columns are called {name!r}; rename one")
    return names


def _chunks(rows: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    chunk: list[list[str]] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(map(len, row)) + len(row)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _delimiter(file: Path, encoding: str | None) -> str:
    """The delimiter that parts the heading; of several, the one that parts every row into as many cells."""
    likely = [mark for mark in DELIMITERS if _width(file, encoding, mark) > 1]
    if len(likely) > 1:
        likely = [mark for mark in likely if _is_even(file, encoding, mark)]
    if len(likely) > 1:
        named = " and ".join(DELIMITERS[mark] for mark in likely)
        raise UnreadableError(f"its cells may be parted by {named}; give the source its delimiter")
    return likely[0] if likely else ","


def _width(file: Path, encoding: str | None, delimiter: str) -> int:
    with open_text(file, encoding, "") as stream:
        try:
            return len(next(_records(stream, delimiter), []))
        except UnreadableError:
            return 0


def _is_even(file: Path, encoding: str | None, delimiter: str) -> bool:
    with open_text(file, encoding, "") as stream:
        try:
            return all(True for _ in islice(_records(stream, delimiter), LOOKED_AT))
        except UnreadableError:
            return False
