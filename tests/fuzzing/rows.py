"""Targets that read rows: valid files of every format, damaged, packed, misnamed; and generated values."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from fuzzing.mutations import any_text, any_value, as_json, change, changed, damage, damaged
from fuzzing.trial import Target
from spunge.data.chat import read_conversation, read_tools
from spunge.data.rows import Records, read_rows
from spunge.recipe.rows import Source

ROWS = [
    {"kind": "a", "n": 1, "text": "words", "list": [1, 2], "record": {"x": 1.5, "y": None}},
    {"kind": "b", "n": 2, "text": "mots é", "list": [], "record": {"x": None, "y": "z"}},
    {"kind": None, "n": 3, "text": "", "list": None, "record": None},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()
INSIDE = json.dumps({"version": 1, "data": ROWS}).encode()
COLUMNS = json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode()
TABLE = b'kind,n,text\na,1,"words, more"\nb,2,"a ""quote"""\n,3,\n'
TABS = TABLE.replace(b",", b"\t")
LONG = b"".join(b'{"text": "%d %s"}\n' % (number, b"word " * 20) for number in range(50))


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(list(rows))
    return table.append_column("day", pa.array([1, 2, None][: len(rows)], pa.date32())).append_column(
        "word", pa.array(["x", "y", "x"][: len(rows)]).dictionary_encode()
    )


def _parquet(**options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(_table(ROWS), sink, **options)
    return sink.getvalue()


def _arrow(stream: bool = False, **options: Any) -> bytes:
    sink, table = io.BytesIO(), _table(ROWS)
    written = pa.ipc.IpcWriteOptions(**options)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=written) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _feather() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(_table(ROWS), sink)
    return sink.getvalue()


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue())


CONTENTS: dict[str, tuple[bytes, ...]] = {
    "jsonl": (LINES, LONG, LINES.replace(b"\n", b"\r\n"), LINES.decode().encode("utf-16"), b"\xef\xbb\xbf" + LINES),
    "json": (LIST, INSIDE, COLUMNS, LINES, b'{"a": 1}'),
    "csv": (
        TABLE,
        TABLE.replace(b",", b";"),
        b"sep=;\r\n" + TABLE.replace(b",", b";"),
        TABS,
        TABLE.replace(b"\n", b"\r"),
    ),
    "tsv": (TABS,),
    "txt": (b"one\ntwo\r\nthree", "eins\nzw\u00f6lf\n".encode("utf-16-le"), b""),
    "parquet": (_parquet(), _parquet(compression="none", use_dictionary=False), _parquet(data_page_version="2.0")),
    "arrow": (_arrow(), _arrow(stream=True), _arrow(compression="lz4")),
    "feather": (_feather(),),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zstd,
}


def read(file: Path, content: bytes, **options: Any) -> Records:
    file.write_bytes(content)
    records = read_rows([Source(path=str(file), **options)], "forget.source")
    records.table.validate(full=True)
    assert records.table.num_rows
    return records


def _lines_of(content: bytes) -> int | None:
    """Rows that Python's json reads, one a line; None where some line is no object of its own."""
    try:
        values = [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None
    return len(values) if values and all(isinstance(value, dict) for value in values) else None


def _plain(ending: str) -> Callable[[Path, bytes], int]:
    def call(folder: Path, content: bytes) -> int:
        records = read(folder / f"rows.{ending}", content)
        if ending == "jsonl" and (lines := _lines_of(content)) is not None and lines > 1:
            assert records.table.num_rows == lines
        if ending == "parquet":
            assert records.table.num_rows == pq.ParquetFile(io.BytesIO(content)).metadata.num_rows
        return len(content)

    return call


def _packed(folder: Path, case: tuple[str, str, bytes]) -> int:
    ending, packing, content = case
    read(folder / f"rows.{ending}.{packing}", content)
    return len(content)


def _misnamed(folder: Path, case: tuple[str, bytes, str | None, str | None]) -> int:
    ending, content, encoding, delimiter = case
    read(folder / f"rows.{ending}", content, encoding=encoding, delimiter=delimiter)
    return len(content)


def _values(folder: Path, rows: Any) -> int:
    """Rows of any values: what json writes is read, with as many rows, and each column that is text holds its texts."""
    content = b"\n".join(map(as_json, rows))
    records = read(folder / "rows.jsonl", content)
    if len(rows) > 1:
        assert records.table.num_rows == len(rows)
        for name in records.table.column_names:
            values = [row.get(name) for row in rows]
            if all(value is None or isinstance(value, str) for value in values):
                assert records.table[name].to_pylist() == values
    return len(content)


def _cells(folder: Path, rows: list[list[str]]) -> int:
    """What Python's csv writes is read back."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    content = text.getvalue().encode("utf-8", "surrogatepass")
    records = read(folder / "rows.csv", content, delimiter=",")
    if all(rows[0]):
        assert records.table.column_names == rows[0]
    return len(content)


MESSAGES = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}],
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"role": ["user", "assistant"], "content": ["a", "b"]},
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": "b"},
    ],
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}]


def _chat(folder: Path, value: Any) -> int:
    messages = read_conversation(value, "forget.messages: row 1")
    assert all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in messages)
    return 1 << 14


def _tools(folder: Path, value: Any) -> int:
    read_tools(value, "forget.tools: row 1")
    return 1 << 14


def _conversation(chance: random.Random) -> Any:
    """A value, as JSON text, or as damaged text."""
    messages = chance.choice(MESSAGES)
    match chance.randrange(3):
        case 0:
            return change(chance, messages)
        case 1:
            return as_json(change(chance, messages)).decode()
    return damage(chance, as_json(messages)).decode("utf-8", "replace")


_BOMBS = {name: pack(b"a" * (1 << 20)) for name, pack in PACKED.items()}
_ENCODINGS = (
    None,
    None,
    "utf-16",
    "utf-16-le",
    "cp1252",
    "utf-8-sig",
    "latin-1",
    "shift_jis",
    "utf-7",
    "idna",
    "punycode",
)
_DELIMITERS = (None, None, ",", " ", "a", "\u2028")
_ENDINGS = (*CONTENTS, "ndjson", "JSONL", "xlsx")
_EVERY = [content for contents in CONTENTS.values() for content in contents]


def _some_packed(chance: random.Random) -> tuple[str, str, bytes]:
    name = chance.choice([*PACKED])
    content = chance.choice([LINES, TABLE, CONTENTS["parquet"][0], b""])
    packed = _BOMBS[name] if chance.random() < 0.1 else PACKED[name](content)
    return chance.choice(["jsonl", "csv", "parquet", "txt"]), name, damage(chance, packed)


def _some_misnamed(chance: random.Random) -> tuple[str, bytes, str | None, str | None]:
    return chance.choice(_ENDINGS), chance.choice(_EVERY), chance.choice(_ENCODINGS), chance.choice(_DELIMITERS)


def _some_rows(chance: random.Random) -> list[dict[str, Any]]:
    names = ["a", "A", "b c", "", "text", any_text(chance, 3)]
    return [
        {name: any_value(chance) for name in chance.sample(names, chance.randrange(4))}
        for _ in range(chance.randint(1, 4))
    ]


def _some_cells(chance: random.Random) -> list[list[str]]:
    return [[any_text(chance, 4), any_text(chance, 4)] for _ in range(chance.randint(2, 4))]


_CASES = (600, 400, 400, 200, 200, 300, 300, 100)

TARGETS = (
    *(
        Target(f"rows-{ending}", damaged(*contents), _plain(ending), cases)
        for (ending, contents), cases in zip(CONTENTS.items(), _CASES, strict=True)
    ),
    Target("rows-packed", _some_packed, _packed, 300),
    Target("rows-misnamed", _some_misnamed, _misnamed, 200),
    Target("rows-values", _some_rows, _values, 300),
    Target("rows-cells", _some_cells, _cells, 200),
    Target("chat", _conversation, _chat, 4500),
    Target("tools", changed(TOOLS, as_json(TOOLS).decode()), _tools, 2500),
)
