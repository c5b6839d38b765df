"""Rows of JSON files: one object a line, a list of objects, or one object with the list inside. Read a few MB at a time."""

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pyarrow as pa

from spunge.data.decoding import UnreadableError, open_text
from spunge.data.keeping import Keeper
from spunge.data.kinds import TEXT, Digits, column_of, kind_of, merged

CHUNK = 1 << 24  # characters that are parsed at a time
MOST_COLUMNS = 10_000
LINES = (".jsonl", ".ndjson")
BETWEEN = ",0,"  # joins the lines of a chunk, so that two broken lines cannot make a whole one

Row = dict[str, Any]
Kinds = dict[str, pa.DataType]  # column -> its type
Parse = Callable[[str], Any]


def read_json(
    file: Path, ending: str, encoding: str | None, text: Sequence[str], keeper: Callable[[], Keeper]
) -> pa.Table:
    """The file's rows. text: columns that are text whatever they hold. Raises UnreadableError.

    The file is read again where a value widens the type that those before it had, and once more, each number as it is
    spelled, where numbers are to be text.
    """
    kinds: Kinds = dict.fromkeys(text, TEXT)
    spelled = False
    for _ in range(6):
        with keeper() as kept, open_text(file, encoding, None) as stream:
            kinds, again = _read(_chunks(stream, ending, _decoder(spelled)), kinds, spelled, kept)
            if again is None:
                return kept.table()
            spelled = again
    raise UnreadableError("it changes while it is read")


def _read(chunks: Iterator[list[Row]], kinds: Kinds, spelled: bool, kept: Keeper) -> tuple[Kinds, bool | None]:
    """Read the file once: the types that hold all of its rows; and whether to read again, with numbers as spelled or not, or
    None where `kept` has it all."""
    again: bool | None = None
    count = 0
    for rows in chunks:
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}
        if len(columns) > MOST_COLUMNS:
            raise UnreadableError(f"its rows have more than {MOST_COLUMNS} different keys")
        wider = (
            kinds
            if spelled
            else kinds | {name: merged(kinds.get(name, pa.null()), kind_of(values)) for name, values in columns.items()}
        )
        if count and wider != kinds and again is None:
            again = spelled
        kinds = wider
        if again is None:
            values_of = {name: columns.get(name) or [None] * len(rows) for name in kinds}
            arrays = {name: _array(values, kinds[name], spelled, name, count) for name, values in values_of.items()}
            failed = [name for name, array in arrays.items() if array is None]
            if failed:
                again = True
                kinds = kinds | (dict.fromkeys(failed, TEXT) if spelled else {})
            else:
                kept.add(pa.table(arrays))
        count += len(rows)
    return kinds, again


def _array(values: list[Any], kind: pa.DataType, spelled: bool, column: str, before: int) -> pa.Array | None:
    """The values in a type, or None where it does not hold them as they are."""
    try:
        return column_of(values, kind) if spelled else pa.array(values, kind)
    except UnicodeEncodeError:
        row = next(number for number, value in enumerate(values) if _is_broken(value))
        raise UnreadableError(
            f"row {before + row + 1}: {column!r} holds half of a surrogate pair, which is no text"
        ) from None
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return None


def _is_broken(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _decoder(spelled: bool) -> json.JSONDecoder:
    as_spelled: dict[str, Any] = {"parse_int": Digits, "parse_float": Digits} if spelled else {}
    # Python writes NaN for what is missing in a data frame; as a number it would be greater than every other in SQL.
    constants = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=constants.__getitem__, **as_spelled)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"the key {twice!r} stands twice in one object")
    return content


def _chunks(stream: TextIO, ending: str, decoder: json.JSONDecoder) -> Iterator[list[Row]]:
    """The file's rows, some thousands at a time."""
    first = _line(stream)
    second = _line(stream) if _is_object(first, decoder) else ""
    if _is_object(second, decoder):
        return _lines(first + second, stream, decoder)
    return _values(first + second, stream, ending, decoder)


def _line(stream: TextIO) -> str:
    """The next line that is not blank, or nothing; of a long list, its beginning."""
    while line := stream.readline(CHUNK):
        if line.strip():
            return line + stream.readline() if line.lstrip().startswith("{") and not line.endswith("\n") else line
    return ""


def _is_object(line: str, decoder: json.JSONDecoder) -> bool:
    try:
        return isinstance(decoder.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(first: str, stream: TextIO, decoder: json.JSONDecoder) -> Iterator[list[Row]]:
    """Rows of a file with one object a line."""
    count = 0
    lines = first.split("\n") + stream.readlines(CHUNK)
    while lines:
        written = [line for line in lines if line and not line.isspace()]
        if written:
            with _without_collector():
                rows = _parsed(written, decoder, count)
            yield rows
            count += len(rows)
        lines = stream.readlines(CHUNK)


def _parsed(lines: list[str], decoder: json.JSONDecoder, before: int) -> list[Row]:
    """One object of each line, all at one go, which takes half the time of one by one."""
    try:
        values = decoder.decode(f"[{BETWEEN.join(lines)}]")
        rows: list[Row] = values[::2]
        if len(values) == 2 * len(lines) - 1 and set(map(type, rows)) == {dict} and not any(map(_is_row, values[1::2])):
            return rows
    except (ValueError, RecursionError):
        pass
    return [_row(line, decoder, number) for number, line in enumerate(lines, start=before + 1)]


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _row(line: str, decoder: json.JSONDecoder, number: int) -> Row:
    try:
        value = decoder.decode(line)
    except (ValueError, RecursionError) as error:
        _refuse(error, number)
    return _checked(value, number)


def _checked(value: Any, number: int) -> Row:
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else json.dumps(value)[:40]
        raise UnreadableError(f"row {number} is {kind}, not an object with the columns' names as its keys")
    return value


def _refuse(error: Exception, number: int) -> NoReturn:
    if isinstance(error, json.JSONDecodeError):
        raise UnreadableError(f"row {number} is no JSON: {error.msg}, at its character {error.pos + 1}") from None
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise UnreadableError(f"row {number}: {reason}") from None


class _Text:
    """Text that is read from a stream as far as it is needed."""

    def __init__(self, buffer: str, stream: TextIO) -> None:
        self._buffer, self._stream, self._ended = buffer, stream, False
        self._at = 0
        self.taken = 0  # characters that were taken

    def next(self) -> str:
        """The next character that is no space, which stays; nothing at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self, decoder: json.JSONDecoder, number: int) -> Any:
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # What is cut off where the buffer ends may be whole with more of it.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - 64
                if not (cut and self._fill()):
                    _refuse(json.JSONDecodeError(error.msg, error.doc[self._at :], error.pos - self._at), number)
            except (ValueError, RecursionError) as error:
                _refuse(error, number)
            else:
                self.taken += end - self._at
                self._at = end
                return value

    def _fill(self) -> bool:
        more = "" if self._ended else self._stream.read(max(CHUNK, len(self._buffer)))
        self._ended = not more
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)


def _values(first: str, stream: TextIO, ending: str, decoder: json.JSONDecoder) -> Iterator[list[Row]]:
    """Rows of a file that is a list of objects, or objects one after the other over several lines each."""
    text = _Text(first, stream)
    objects = _objects(text, decoder)
    rows = list(islice(objects, 2))
    if len(rows) == 1 and not first.lstrip().startswith("["):
        yield from _document(rows[0], ending)
        return
    while rows:
        stop = text.taken + CHUNK
        with _without_collector():
            for row in objects:
                rows.append(row)
                if text.taken >= stop:
                    break
        yield rows
        rows = list(islice(objects, 1))


def _objects(text: _Text, decoder: json.JSONDecoder) -> Iterator[Row]:
    listed = text.next() == "["
    if listed:
        text.skip()
    number = 0
    while (here := text.next()) and not (listed and here == "]"):
        if listed and number:
            if here != ",":
                raise UnreadableError(f"row {number + 1}: no comma stands before it")
            text.skip()
            text.next()
        number += 1
        yield _checked(text.value(decoder, number), number)
        if not listed and text.next() == ",":
            raise UnreadableError(f"a comma follows row {number}; rows one a line are parted by line breaks alone")
    if listed:
        text.skip()
        if not here or text.next():
            raise UnreadableError(
                "its list is not closed" if not here else f"something follows its list of {number} rows"
            )


def _document(content: Row, ending: str) -> Iterator[list[Row]]:
    """The rows of a file that is one object: of the list inside, of columns of equal length, or that object alone."""
    lists = [name for name, value in content.items() if isinstance(value, list) and value and all(map(_is_row, value))]
    if ending in LINES or not content:
        yield [content] if content else []
    elif len(lists) > 1:
        raise UnreadableError(
            f"it holds several lists of rows ({', '.join(lists)}); write the one that is meant to a file of its own"
        )
    elif lists:
        yield content[lists[0]]
    elif all(isinstance(value, list) for value in content.values()):
        if len(lengths := {len(value) for value in content.values()}) > 1:
            raise UnreadableError(f"its columns have unequal lengths ({', '.join(map(str, sorted(lengths)))})")
        yield [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    else:
        yield [content]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without the garbage collector, which finds nothing in parsed JSON and takes as long as the parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
