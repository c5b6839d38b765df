"""Reading files: what stands in them is what is read, whatever tool wrote them, or they are refused with file and row."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spunge.data import jsonrows, keeping, textrows
from spunge.data.rows import Records, find_files, read_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.recipe.rows import Source

ROWS = [{"kind": "a" if number % 2 else "b", "text": f"words {number}"} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "kind,text\n" + "".join(f"{row['kind']},{row['text']}\n" for row in ROWS)


def read(path: Path | str, **options: Any) -> Records:
    return read_rows([Source(path=str(path), **options)], "forget.source")


def rows_of(path: Path, content: str | bytes, **options: Any) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    rows: list[dict[str, Any]] = read(path, **options).table.to_pylist()
    return rows


def refusal(path: Path, content: str | bytes, **options: Any) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecipeError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.startswith("forget.source: ")
    assert "\n" not in message
    return message


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue())


# Every format


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]], stream: bool = False) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_feather(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


PLAIN = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.replace("\n", "\r\n").encode(),
    "blank.jsonl": LINES.replace("\n", "\n\n \n").encode(),
    "a.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "inside.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "a.csv": TABLE.encode(),
    "crlf.csv": TABLE.replace("\n", "\r\n").encode(),
    "cr.csv": TABLE.replace("\n", "\r").encode(),
    "semicolon.csv": TABLE.replace(",", ";").encode(),
    "tab.csv": TABLE.replace(",", "\t").encode(),
    "bar.csv": TABLE.replace(",", "|").encode(),
    "a.tsv": TABLE.replace(",", "\t").encode(),
    "excel.csv": ("sep=;\r\n" + TABLE.replace(",", ";")).encode(),
    "a.parquet": as_parquet(ROWS),
    "a.arrow": as_arrow(ROWS),
    "stream.arrow": as_arrow(ROWS, stream=True),
    "a.feather": as_feather(ROWS),
    "UPPER.JSONL": LINES.encode(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_format_reads_to_the_same_rows(tmp_path: Path, name: str) -> None:
    assert rows_of(tmp_path / name, PLAIN[name]) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_packed_files_read_as_the_file_inside(
    tmp_path: Path, name: str, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(PLAIN[name])
    assert rows_of(tmp_path / (name + ending), packed) == ROWS
    assert "cannot be read" in refusal(tmp_path / ("cut" + name + ending), packed[: len(packed) // 2])
    assert "cannot be read" in refusal(tmp_path / ("plain" + name + ending), PLAIN[name])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path: Path, name: str, encoding: str) -> None:
    plain = {**PLAIN, "a.txt": b"one\ntwo\n"}[name].decode().replace("words", "Wörter")
    assert rows_of(tmp_path / ("marked" + name), plain.encode(encoding)) == rows_of(tmp_path / name, plain)


def test_another_encoding_is_asked_for_by_line_and_byte_and_then_used(tmp_path: Path) -> None:
    content = "kind,text\na,plain\nb,caf\u00e9 \u201cquoted\u201d\n".encode("cp1252")
    message = refusal(tmp_path / "a.csv", content)
    assert "line 3: byte 0xe9 is not UTF-8" in message
    assert "encoding: cp1252" in message
    assert rows_of(tmp_path / "a.csv", content, encoding="cp1252")[1]["text"] == "caf\u00e9 \u201cquoted\u201d"
    assert "UTF-16 without a byte order mark" in refusal(tmp_path / "b.csv", TABLE.encode("utf-16-le"))
    assert rows_of(tmp_path / "b.csv", TABLE.encode("utf-16-le"), encoding="utf-16-le") == ROWS
    assert "encoding" in refusal(tmp_path / "c.csv", b"kind,text\na,\xff", encoding="ascii")
    with pytest.raises(ValueError, match="no encoding 'klingon'; such are utf-8"):
        Source(path="a.csv", encoding="klingon")


def test_plain_text_is_a_row_for_each_line(tmp_path: Path) -> None:
    content = "one\r\n two \n\nNA\u2028same line\x0bsame\rlast"
    rows = [row["text"] for row in rows_of(tmp_path / "a.txt", content)]
    assert rows == ["one", " two ", "", "NA\u2028same line\x0bsame", "last"]


# The file as it is now


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_changed_under_the_same_name_size_and_time_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, in_memory: bool
) -> None:
    monkeypatch.setattr(keeping, "IN_MEMORY", keeping.IN_MEMORY if in_memory else 0)
    file = tmp_path / name
    for word in ("old", "new"):
        rows = [{"text": f"{word} {number}"} for number in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        contents = {
            "a.jsonl": lines.encode(),
            "a.csv": ("text\n" + "".join(row["text"] + "\n" for row in rows)).encode(),
            "a.parquet": as_parquet(rows),
            "a.jsonl.gz": gzip.compress(lines.encode(), mtime=0),
        }
        assert rows_of(file, contents[name]) == rows
        assert read(file).table.to_pylist() == rows
        os.utime(file, (1_700_000_000, 1_700_000_000))


def test_large_tables_lie_in_a_mapped_file_that_the_next_process_takes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "IN_MEMORY", 1000)
    monkeypatch.setattr(jsonrows, "CHUNK", 500)
    rows = [{"text": f"words {number}", "late": number if number > 90 else None} for number in range(100)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = pa.total_allocated_bytes()
    table = read(file).table
    assert pa.total_allocated_bytes() - before < 1000
    assert table.to_pylist() == rows
    (kept,) = (tmp_path.with_name(f"{tmp_path.name}-cache") / "rows").iterdir()
    keeping._recent.clear()
    monkeypatch.setattr(jsonrows, "_read", None)
    assert read(file).table.to_pylist() == rows
    keeping._recent.clear()
    monkeypatch.undo()
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    kept.write_bytes(kept.read_bytes()[:100])
    assert read(file).table.to_pylist() == rows, "a damaged file of the cache is made anew"


# JSON


def test_a_column_of_several_kinds_is_text_as_the_file_spells_it(tmp_path: Path) -> None:
    lines = [
        '{"v": 7, "w": [1], "x": {"id": 1}, "y": 9007199254740993, "z": true}',
        '{"v": "7", "w": ["1"], "x": {"id": "b"}, "y": 0.5, "z": 1.0}',
        '{"v": 1.10, "w": null, "x": {"id": 2.50}, "y": 1, "z": false}',
        '{"v": 1e5, "w": [], "x": null, "y": 2, "z": 0}',
        '{"v": {"a": [1.0, "é"]}, "w": [2.0], "x": {}, "y": 3, "z": null}',
    ]
    rows = rows_of(tmp_path / "a.jsonl", "\n".join(lines))
    assert [row["v"] for row in rows] == ["7", "7", "1.10", "1e5", '{"a": [1.0, "é"]}']
    assert [row["w"] for row in rows] == [["1"], ["1"], None, [], ["2.0"]]
    assert [row["x"] for row in rows] == [{"id": "1"}, {"id": "b"}, {"id": "2.50"}, None, {"id": None}]
    assert [row["y"] for row in rows] == ["9007199254740993", "0.5", "1", "2", "3"]
    assert [row["z"] for row in rows] == ["true", "1.0", "false", "0", None]


@pytest.mark.parametrize("chunk", [40, 1 << 24])
@pytest.mark.parametrize("late", ["the last", 2.5, [1], {"x": 1}, "2024-01-05", None, True, 2**70])
def test_what_comes_late_in_a_file_reads_as_if_it_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: Any, chunk: int
) -> None:
    monkeypatch.setattr(jsonrows, "CHUNK", chunk)
    rows = [{"text": f"words {number}", "page": number} for number in range(50)]
    last = {"text": "end", "page": late, "new": late}
    forward = rows_of(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, last]))
    backward = rows_of(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in [last, *rows]))
    assert forward == [*backward[1:], backward[0]]
    assert [row["text"] for row in forward] == [*(row["text"] for row in rows), "end"]


def test_nan_in_json_is_missing(tmp_path: Path) -> None:
    """As Python writes what is missing in a data frame; SQL would take it for the greatest number."""
    assert rows_of(tmp_path / "a.jsonl", '{"a": NaN, "b": NaN}\n{"a": "x", "b": 1.5}\n{"a": 7, "b": Infinity}') == [
        {"a": None, "b": None},
        {"a": "x", "b": 1.5},
        {"a": "7", "b": float("inf")},
    ]


def test_dates_in_json_are_the_text_they_are(tmp_path: Path) -> None:
    rows = [{"day": "2024-01-05", "at": "2024-01-05T10:00:00Z"}, {"day": None, "at": "10:00"}]
    assert rows_of(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == rows


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"a": 1}', '{"a": 1'], ["row 2 is no JSON"]),
        (['{"a": 1', '"b": 2}'], ["row 1 is no JSON"]),
        (['{"a": [1', "2]}"], ["row 1 is no JSON"]),
        (['{"a": 1}, {"a": 2}', '{"a": 3'], ["a comma follows row 1"]),
        (['{"a": 1},', '{"a": 2},'], ["a comma follows row 1"]),
        (['{"a": 1}', "[1]"], ["row 2 is a list, not an object"]),
        (['{"a": 1}', "", '"words"'], ['row 2 is "words", not an object']),
        (['{"a": 1}', "17"], ["row 2 is 17, not an object"]),
        (['{"a": 1, "a": 2}'], ["row 1", "'a' stands twice"]),
        (['{"a": 1}', '{"b": {"c": 1, "c": 1}}'], ["row 2", "'c' stands twice"]),
        (['{"a": "x"}', '{"a": "\\ud800"}'], ["row 2", "surrogate"]),
        (['{"a": ' + "[" * 100_000], ["row 1", "nested too deeply"]),
        (['[{"a": 1},', '{"a": }]'], ["row 2 is no JSON"]),
        (['[{"a": 1}', '{"a": 2}]'], ["row 2", "no comma"]),
        (['[{"a": 1}'], ["not closed"]),
        (['[{"a": 1},'], ["row 2 is no JSON"]),
        (['[{"a": 1}]', '{"a": 2}'], ["something follows"]),
        (['[{"a": 1}, [2]]'], ["row 2 is a list"]),
    ],
)
@pytest.mark.parametrize("chunk", [8, 1 << 24])
def test_broken_json_is_refused_with_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], said: list[str], chunk: int
) -> None:
    monkeypatch.setattr(jsonrows, "CHUNK", chunk)
    message = refusal(tmp_path / "broken.jsonl", "\n".join(lines))
    for part in ["broken.jsonl", "cannot be read", *said]:
        assert part in message, message


def test_of_an_object_with_several_lists_none_is_guessed(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS}))
    assert "several lists of rows (train, test)" in message
    assert "unequal lengths" in refusal(tmp_path / "b.json", json.dumps({"text": ["a"], "kind": ["b", "c"]}))
    assert rows_of(tmp_path / "c.json", json.dumps(ROWS[0])) == [ROWS[0]]
    assert rows_of(tmp_path / "d.jsonl", json.dumps({"data": ROWS})) == [{"data": ROWS}], "a line is a row"


def test_a_line_longer_than_a_chunk_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jsonrows, textrows):
        monkeypatch.setattr(module, "CHUNK", 100)
    rows = [{"text": "long " * 200}, {"text": "short"}, {"text": "longer " * 500}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    assert rows_of(tmp_path / "a.jsonl", content) == rows
    assert rows_of(tmp_path / "a.json", json.dumps(rows)) == rows
    assert rows_of(tmp_path / "a.csv", "text\n" + "".join(f"{row['text']}\n" for row in rows)) == rows


def test_records_whose_keys_are_data_become_text_in_place_of_a_column_each(tmp_path: Path) -> None:
    rows = [{"text": "x", "meta": {f"id{number}{part}": number for part in range(20)}} for number in range(200)]
    read_back = rows_of(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [json.loads(row["meta"]) for row in read_back] == [row["meta"] for row in rows]


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
objects = st.lists(
    st.dictionaries(st.sampled_from(["a", "A", "b", "x y", "é", ""]), values, max_size=4), min_size=1, max_size=8
)


def same(written: Any, read_back: Any) -> bool:
    """Whether a value was read as it was written: as itself, or as its text where its column is text."""
    if read_back is None:
        return written is None
    if isinstance(read_back, str) and not isinstance(written, str):
        return bool(json.loads(read_back) == written) and (written is True) == (read_back == "true")
    if isinstance(read_back, list):
        return len(written) == len(read_back) and all(map(same, written, read_back))
    if isinstance(read_back, dict):
        return written.keys() <= read_back.keys() and all(
            same(written.get(key), item) for key, item in read_back.items()
        )
    return bool(written == read_back) and isinstance(written, bool) == isinstance(read_back, bool)


@settings(max_examples=60, deadline=None)
@given(objects, st.sampled_from(["lines", "list", "pretty"]), st.sampled_from([20, 1 << 24]))
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, form: str, chunk: int
) -> None:
    """The oracle is Python's json module."""
    rows = [{"z": 0, **row} for row in rows] + [{"z": 1}] if form == "pretty" else rows
    written = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "list": json.dumps(rows, ensure_ascii=False),
        "pretty": "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows),
    }[form]
    file = tmp_path_factory.getbasetemp() / "written.jsonl"
    file.write_text(written, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonrows, "CHUNK", chunk)
        keeping._recent.clear()
        if not any(rows):
            return
        read_back = read(file).table.to_pylist()
    assert len(read_back) == len(rows)
    assert all(map(same, rows, read_back)), (rows, read_back)


# CSV

WORDS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "true",
    "TRUE",
    "007",
    "1e5",
    "1.50",
    "2024-01-05",
    "1_000",
    "-",
    " x ",
    "\t",
]


def test_the_words_of_csv_stay_words_and_only_an_empty_cell_is_missing(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["word", "n"], *([word, ""] for word in WORDS)])
    assert read(tmp_path / "a.csv").table.to_pylist() == [{"word": word, "n": None} for word in WORDS]
    assert rows_of(tmp_path / "b.csv", 'a,b\n"",1\n') == [{"a": None, "b": "1"}]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
                min_size=width,
                max_size=width,
            ),
            max_size=6,
        )
    ),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([30, 1 << 24]),
)
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str, end: str, chunk: int
) -> None:
    """The oracle is Python's csv module."""
    heading = [f"column {number}" for number in range(len(rows[0]) if rows else 2)]
    file = tmp_path_factory.getbasetemp() / "written.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        # The writer leaves an end of line bare that is not its own, and its own reader then breaks there.
        bare = any(sign in cell for row in rows for cell in row for sign in "\r\n")
        quoting = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
        csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([heading, *rows])
    with file.open(newline="", encoding="utf-8") as back:
        assert [row for row in csv.reader(back, delimiter=delimiter) if row] == [heading, *rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textrows, "CHUNK", chunk)
        keeping._recent.clear()
        if not rows:
            return
        read_back = read(file, delimiter=delimiter if len(heading) == 1 else None).table.to_pylist()
    assert [[value or "" for value in row.values()] for row in read_back] == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n3\n", ["row 2 (line 3)", "1 cells and the heading 2"]),
        ("a,b\n1,2,3\n", ["row 1 (line 2)", "3 cells and the heading 2", "a comma"]),
        ('a,b\n1,"x\ny\n', ["row 1", "never closed"]),
        ('a,b\n1,2\n1,"x" y\n', ["row 2", "write a double quote inside a quoted cell twice"]),
        ('a,b\n1,"he said \\"no\\""\n', ["row 1", "twice"]),
        ("a,b,a\n1,2,3\n", ["two of its columns are called 'a'"]),
        ("a;b,c\n1;2,3\n", ["a comma and a semicolon", "delimiter"]),
        ("text\nhello, you\n", ["row 1", "double quotes"]),
    ],
)
def test_a_broken_table_is_refused_with_file_and_row(tmp_path: Path, content: str, said: list[str]) -> None:
    message = refusal(tmp_path / "broken.csv", content)
    for part in ["broken.csv", "cannot be read", *said]:
        assert part in message, message


def test_the_heading_tells_the_delimiter_and_the_rows_decide_between_two(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", "kind;text\na;one, two\n") == [{"kind": "a", "text": "one, two"}]
    assert rows_of(tmp_path / "b.csv", "kind;a, b\nx;one\ny;two\n") == [
        {"kind": "x", "a, b": "one"},
        {"kind": "y", "a, b": "two"},
    ]
    assert rows_of(tmp_path / "c.csv", "a;b,c\n1;2,3\n", delimiter=",") == [{"a;b": "1;2", "c": "3"}]
    assert rows_of(tmp_path / "d.csv", ",text\n0,one\n") == [{"Unnamed: 0": "0", "text": "one"}]


def test_cells_may_be_longer_than_the_csv_module_s_default(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", f"a,b\n1,{'x' * 300_000}\n")[0]["b"] == "x" * 300_000


# Arrow's types

TYPES = {
    "large": pa.array(["x", None], pa.large_string()),
    "view": pa.array(["x", None], pa.string_view()),
    "dictionary": pa.array(["x", None]).dictionary_encode(),
    "dictionary of large": pa.array(["x", None], pa.large_string()).dictionary_encode(),
    "extension": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["x", None])),
}
NESTED = {
    "list of views": pa.array([["x"], None], pa.list_(pa.string_view())),
    "large list": pa.array([["x"], None], pa.large_list(pa.large_string())),
    "list view": pa.array([["x"], None], pa.list_view(pa.string_view())),
    "fixed size": pa.array([["x"], None], pa.list_(pa.string(), 1)),
    "list of dictionaries": pa.array([["x"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
}


@pytest.mark.parametrize("name", [*TYPES, *NESTED])
def test_every_arrow_type_of_text_reads_as_text(tmp_path: Path, name: str) -> None:
    column = {**TYPES, **NESTED}[name]
    table = pa.table({"t": pa.chunked_array([column.slice(0, 1), column.slice(1)])})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    back = read(tmp_path / "a.arrow").table
    assert back["t"].type == (pa.string() if name in TYPES else pa.list_(pa.string()))
    assert back["t"].to_pylist() == ["x" if name in TYPES else ["x"], None]


def test_parquet_with_two_columns_of_one_name_or_broken_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"a\.parquet.*two of its columns are called 'a'"):
        read(tmp_path / "a.parquet")
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"a": broken}), tmp_path / "b.parquet")
    with pytest.raises(RecipeError, match=r"b\.parquet.*rows 1 to 1.*UTF8"):
        read(tmp_path / "b.parquet")
    assert "cannot be read" in refusal(tmp_path / "c.parquet", b"PAR1 and no more")
    assert "cannot be read" in refusal(tmp_path / "c.arrow", b"ARROW1 and no more")


# Several files


def test_folders_and_globs_and_lists_of_sources_add_up(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / ".hidden.jsonl").write_text('{"text": "hidden"}')
    (tmp_path / "notes.md").write_text("no rows")
    both = [Source(path=str(tmp_path)), Source(path=str(tmp_path / "*.jsonl"), assign={"domain": "bio"})]
    rows = read_rows(both, "forget.source").table.to_pylist()
    assert [(row["text"], row["domain"]) for row in rows] == [("a", None), ("b", None), ("a", "bio"), ("b", "bio")]


@pytest.mark.parametrize(
    ("name", "said"), [("c.csv", "several formats"), ("c.xlsx", "save it as CSV"), ("c.zip", "unknown")]
)
def test_a_folder_with_files_of_another_format_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / name).write_text("text\nc\n")
    with pytest.raises(RecipeError, match=said):
        read(tmp_path)


@pytest.mark.parametrize("name", ["rows.xyz", "rows.xlsx", "rows", "rows.jsonl.lz4"])
def test_a_file_of_an_unknown_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name, "x")
    assert repr(str(tmp_path / name)) in message
    assert "unknown format" in message


def test_files_that_disagree_on_a_column_give_text_as_each_spells_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 7, "v": 1.50}\n{"id": 8, "v": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "x7", "w": 1}\n')
    (tmp_path / "c.csv").write_text("v\n007\n")
    pq.write_table(pa.table({"id": [3], "v": [0.5]}), tmp_path / "d.parquet")
    sources = [Source(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.csv", "d.parquet")]
    table = read_rows(sources, "forget.source").table
    assert table["id"].to_pylist() == ["7", "8", "x7", None, "3"]
    assert table["v"].to_pylist() == ["1.50", "2", None, "007", "0.5"]
    assert table["w"].to_pylist() == [None, None, 1, None, None]


def test_an_empty_file_among_others_stops_nothing_and_alone_is_refused_by_name(tmp_path: Path) -> None:
    for name, content in {
        "0.jsonl": b"",
        "0.csv": b"kind,text\n",
        "0.json": b"[]",
        "0.parquet": as_parquet(ROWS[:0]),
    }.items():
        assert f"no rows in {name}" in refusal(tmp_path / name, content)
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / f"1.{name[2:]}").write_bytes(PLAIN[f"a.{name[2:]}"])
        assert read(folder).table.to_pylist() == ROWS


def test_a_path_that_exists_is_that_path_whatever_signs_are_in_it(tmp_path: Path) -> None:
    for name in ("rows[1].jsonl", "what*.jsonl", "data [v2]/rows.jsonl", "odd {x}/rows.jsonl", "a?/rows.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"text": "right"}\n')
    for name in ("rows1.jsonl", "whatever.jsonl", "ab/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "wrong"}\n')
    for path in (
        "rows[1].jsonl",
        "what*.jsonl",
        "data [v2]",
        "data [v2]/*.jsonl",
        "odd {x}/rows.jsonl",
        "a?",
        "a?/r*.jsonl",
    ):
        assert read(tmp_path / path).table.to_pylist() == [{"text": "right"}], path
    assert read(tmp_path / "rows?.jsonl").table.to_pylist() == [{"text": "wrong"}]


def test_a_row_is_named_by_its_file_and_number(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("text\n" + "x\n" * 3)
    records = read(tmp_path)
    names = [records.row_name(row) for row in range(6)]
    assert names == [f"row {number} of {name}.csv" for name in "ab" for number in (1, 2, 3)]


def test_rows_that_come_with_the_package_are_named_neutral() -> None:
    (file,) = find_files("neutral", "retain.source")
    table = read("neutral").table
    assert table.column_names == ["text"]
    assert 200 <= table.num_rows <= 500
    assert file.stat().st_size < 300_000
    assert "ShareAlike" in (file.parent / "README.md").read_text()


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.txt", "rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("kind", ["lfs", "gzip", "bzip2", "xz", "zip", "Parquet", "Arrow"])
def test_a_file_that_is_something_else_than_its_name_says_is_refused_by_what_it_is(
    tmp_path: Path, name: str, kind: str
) -> None:
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    with pa.ipc.new_file(arrow, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.csv", TABLE)
    content, wanted = {
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "run git lfs pull"),
        "gzip": (gzip.compress(LINES.encode()), "packed by gzip; call it NAME.gz"),
        "bzip2": (bz2.compress(LINES.encode()), "packed by bzip2; call it NAME.bz2"),
        "xz": (lzma.compress(LINES.encode()), "packed by xz; call it NAME.xz"),
        "zip": (packed.getvalue(), "a zip archive or an Excel file"),
        "Parquet": (parquet.getvalue(), "a Parquet file; call it NAME.parquet"),
        "Arrow": (arrow.getvalue(), "an Arrow file; call it NAME.arrow"),
    }[kind]
    if name.endswith(f".{kind.lower()}"):
        assert rows_of(tmp_path / name, content) == ROWS
    else:
        assert wanted in refusal(tmp_path / name, content)


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("utf-8", "utf-8-sig"),
        ("UTF8", "utf-8-sig"),
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_byte_order_mark_is_no_letter_where_the_encoding_is_given_too(
    tmp_path: Path, name: str, encoding: str, written: str
) -> None:
    content = (TABLE if name == "rows.csv" else LINES).encode(written)
    assert rows_of(tmp_path / name, content, encoding=encoding) == ROWS


@pytest.mark.parametrize(
    ("content", "encoding", "wanted"),
    [
        (TABLE.encode("utf-8-sig"), "cp1252", "its byte order mark says utf-8, not cp1252; leave the encoding out"),
        (TABLE.encode("utf-16"), "latin-1", "its byte order mark says utf-16, not latin-1; leave the encoding out"),
        (TABLE.encode("utf-16-le"), "utf-16", "it is not utf-16 .* give the source its encoding, such as utf-16-le"),
        (TABLE.encode("utf-32-be"), "utf_32", "it is not utf_32 .* give the source its encoding"),
    ],
)
def test_an_encoding_that_the_file_contradicts_is_refused(
    tmp_path: Path, content: bytes, encoding: str, wanted: str
) -> None:
    assert re.search(wanted, refusal(tmp_path / "rows.csv", content, encoding=encoding))


def test_a_dataset_that_was_saved_to_disk_is_read_without_what_its_cache_left_there(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(next((tmp_path / "one").glob("data-*.arrow")).read_bytes())
    assert read(tmp_path / "one").table.to_pylist() == ROWS
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "alone")
    assert read(tmp_path / "alone").table.to_pylist() == ROWS
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two" / "test").table.to_pylist() == ROWS[:1]
    with pytest.raises(RecipeError, match="two' holds the splits train, test; name the folder of one"):
        read(tmp_path / "two")


@pytest.mark.parametrize("url", ["https://x.example/rows.jsonl", "s3://x/rows.parquet", "hf://datasets/x/y/rows.csv"])
def test_a_url_is_refused_as_what_it_is(url: str) -> None:
    with pytest.raises(RecipeError, match=f"'{url}' is a URL; give a file that is here, or {{hub: ID}}"):
        find_files(url, "forget.source")
    recipe = {"model": {"path": "m"}, "forget": {"source": url}, "unlearn": {"method": "tvn"}}
    assert load_recipe(recipe).forget.source[0].path == url


@pytest.mark.parametrize("delimiter", ["tab", "\\t", "||", "", "\n", '"'])
def test_a_delimiter_is_one_character(delimiter: str) -> None:
    forget = {"source": {"path": "x.csv", "delimiter": delimiter}}
    with pytest.raises(
        RecipeError, match=r"delimiter: .* is no delimiter; give one character \(a tab is \"\\t\" in double quotes\)"
    ):
        load_recipe({"model": {"path": "m"}, "forget": forget, "unlearn": {"method": "tvn"}})


def test_a_parquet_file_that_says_more_rows_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Arrow gives the rows there are, without a word."""
    whole = as_parquet([{"n": number} for number in range(3)])
    at = next(at for at in range(len(whole)) if 0 < _rows_said(whole[:at] + b"\x10" + whole[at + 1 :]) == 8)
    assert "it holds 3 rows and says that it holds 8" in refusal(
        tmp_path / "a.parquet", whole[:at] + b"\x10" + whole[at + 1 :]
    )


def _rows_said(content: bytes) -> int:
    try:
        said = pq.ParquetFile(io.BytesIO(content)).metadata
        return int(said.num_rows) if said.row_group(0).num_rows == 3 else 0
    except (pa.ArrowException, OSError):
        return 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_arrow_file_whose_dictionary_says_more_words_than_it_holds_is_refused(tmp_path: Path, stream: bool) -> None:
    """Arrow crashes where it counts the bytes of what lies beyond its buffers."""
    words = [f"word {number}" for number in range(11)]
    sink = io.BytesIO()
    table = pa.table({"word": pa.array(words).dictionary_encode()})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    counts = [place.start() for place in re.finditer(re.escape((11).to_bytes(8, "little")), content)]
    told = []
    for at in counts:
        damaged = content[:at] + (1 << 54).to_bytes(8, "little") + content[at + 8 :]
        try:
            assert rows_of(tmp_path / "a.arrow", damaged) == [{"word": word} for word in words], (
                "not all counts are read"
            )
        except RecipeError as error:
            told.append(str(error))
    assert any("too small" in message for message in told)


def test_a_column_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    content = as_arrow([{"kindred": 1}]).replace(b"kindred", b"kind\xf7ed")
    assert "forget.source: " in refusal(tmp_path / "a.arrow", content)


def test_a_packed_file_that_is_no_utf_8_and_cut_short_further_on_is_refused(tmp_path: Path) -> None:
    lines = b"".join(b'{"n": %d, "word": "%s"}\n' % (number, os.urandom(4000).hex().encode()) for number in range(200))
    content = gzip.compress(b'{"a": "\xff"}\n' + lines)
    refusal(tmp_path / "a.jsonl.gz", content[: len(content) // 2])
    content = gzip.compress(lines + b'{"a": "\xff"}\n' + lines)
    assert "UTF-8" in refusal(tmp_path / "b.jsonl.gz", content)


def test_rows_are_numbered_through_all_files_of_a_source(write_rows: Callable[..., Path]) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(name, [{"text": f"{name} {row}"} for row in range(3)])
    folder = str(write_rows("c.jsonl", [{"text": "last"}]).parent)
    table = read_rows(
        [Source(path=folder, row_number="row"), Source(path=f"{folder}/a.jsonl", row_number="row")], "x"
    ).table
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    with pytest.raises(RecipeError, match=r"x.row_number: there is a column 'text' already; give another name"):
        read_rows([Source(path=folder, row_number="text")], "x")
