"""What is done to a valid file or value: few draws of hypothesis a case, so that thousands of cases take seconds."""

import json
import re
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = 30_000  # levels of nesting, beyond what any parser recurses into
WORD = "long" * 2500  # 10,000 characters
ODD_TEXTS = (
    "", " ", "\n", "\0", "a\0b", "\x1b[31mred", "a\tb", "\u2028", "\u202e", "\ud800", "\ufeff", "\U0001f4a9", "é", "e\u0301",
    "..", "../../x", "/", "~", ".", "*", "[", "a" * 300, WORD, "nan", "inf", "-1", "007", "0x", "1e999", "null", "true",
    "2024-01-05", "12:30", "9" * 5000, "model.path", "__metadata__", "a\r\nb", "$(x)", "{x}", "%s", "'", '"', "\\",
)  # fmt: skip
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, -(2**70), 0.5, -0.0, 1e308, 1e-320)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, *ODD_NUMBERS, *NOT_FINITE, *ODD_TEXTS,
    [], {}, [[]], [{}], {"": None}, [None], [1, "a", None], {"a": {"b": {"c": 1}}}, [0, -1], [2**63, 2], [1.5], ["a", "a"],
    {"a": 1, "A": 2}, {WORD: 1}, {"\ud800": 1}, {"a\0": 1}, [float("nan")], [True, 1], list(range(200)),
)  # fmt: skip
TOKENS = (
    b"\0", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\n", b"\n\n", b"\t",
    b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b": ", b"- ", b"#", b"&a ", b"*a", b"!!set ",
    b"!!python/object:os.system ", b"!!binary ", b"!!timestamp ", b"!!int ", b"<<: ", b"? ", b"| ", b"%YAML 9\n", b"---\n", b"...",
    b"null", b"true", b"NaN", b"-Infinity", b".nan", b".inf", b"1e999", b"-1", b"007", b"0o7", b"0b", b"9" * 5000, b"18446744073709551616",
    b"\x80" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 16, b"[" * DEEP, b'{"a":' * DEEP, WORD.encode(), b"2024-01-05", b"NO", b"12:30:45",
    b'"a":1,"a":2', b"0", b"-",
)  # fmt: skip
_NAME = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:')

Edit = tuple[int, int, Any]  # what is done, where (modulo what there is), with what


def _at(edits: Sequence[Edit], content: bytes) -> bytes:
    for kind, place, token in edits:
        at = place % (len(content) + 1)
        match kind:
            case 0:
                content = content[:at] + token + content[at + len(token) :]
            case 1:
                content = content[:at] + token + content[at:]
            case 2:
                content = content[:at] + content[at + len(token) :]
            case 3:
                content = content[:at]
            case 4:
                content = content[:at] + content[at // 2 :]
            case 5:
                content = (
                    content[:at] + bytes(byte ^ (1 << place % 8) for byte in content[at : at + 1]) + content[at + 1 :]
                )
            case 6:
                content = _renamed(content, place)
    return content


def _renamed(content: bytes, place: int) -> bytes:
    """A JSON text in which one name is another's: it stands twice."""
    names = list(_NAME.finditer(content))
    if len(names) < 2:
        return content
    one, other = names[place % len(names)], names[place // len(names) % len(names)]
    return content[: one.start(1)] + other[1] + content[one.end(1) :]


_PLACES = st.integers(0, 1 << 16)
_BYTES = st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=4)
_EDITS = st.lists(st.tuples(st.integers(0, 6), _PLACES, _BYTES), max_size=3)


def damaged(*contents: bytes) -> st.SearchStrategy[bytes]:
    """One of the contents with up to three edits: bytes set, put in, taken out, flipped, cut off, names of JSON doubled."""
    return st.tuples(st.sampled_from(contents), _EDITS).map(lambda drawn: _at(drawn[1], drawn[0]))


PLAIN = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_VALUES = st.sampled_from(ODD_VALUES) | PLAIN
_CHANGES = st.lists(st.tuples(st.integers(0, 5), _PLACES, _VALUES), min_size=1, max_size=2)


def changed(*documents: Any) -> st.SearchStrategy[Any]:
    """One of the documents, of mappings and lists, with one or two changes: values replaced, keys taken out, renamed, added."""
    return st.tuples(st.sampled_from(documents), _CHANGES).map(lambda drawn: _changed(*drawn))


def _changed(document: Any, changes: Sequence[Edit]) -> Any:
    for kind, place, value in changes:
        paths = list(_paths(document))
        document = _edited(document, paths[place % len(paths)], kind, value)
    return document


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Any:
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*above, key))


def _edited(value: Any, path: tuple[Any, ...], kind: int, new: Any) -> Any:
    if not path:
        match kind:
            case 3 if isinstance(value, dict):
                return {**value, _key(new): value}
            case 4:
                return [value]
            case 5 if isinstance(value, list):
                return [*value, new]
        return new
    inner = path[1:]
    if isinstance(value, list):
        at = path[0]
        if not inner and kind == 1:
            return value[:at] + value[at + 1 :]
        return [*value[:at], _edited(value[at], inner, kind, new), *value[at + 1 :]]
    if not inner and kind == 1:
        return {key: each for key, each in value.items() if key != path[0]}
    if not inner and kind == 2:
        return {_key(new) if key == path[0] else key: each for key, each in value.items()}
    return {key: _edited(each, inner, kind, new) if key == path[0] else each for key, each in value.items()}


def _key(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def as_json(document: Any) -> bytes:
    """JSON text; halves of characters as escapes."""
    return json.dumps(document).encode()


def json_files(*documents: Any) -> st.SearchStrategy[bytes]:
    """Files of JSON: of changed documents, and of damaged text."""
    return changed(*documents).map(as_json) | damaged(*map(as_json, documents))
