"""What is done to a valid file or value, by chance."""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

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
    b"null", b"true", b"NaN", b"-Infinity", b".nan", b".inf", b"1e999", b"-1", b"007", b"0o7", b"0b", b"9" * 5000,
    b"\x80" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 16, b"[" * DEEP, b'{"a":' * DEEP, WORD.encode(), b"2024-01-05", b"NO", b"12:30:45",
    b"18446744073709551616", b'"a":1,"a":2', b"0", b"-",
)  # fmt: skip
_NAME = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:')


def damaged(*contents: bytes) -> Callable[[random.Random], bytes]:
    """One of the contents with up to three edits: bytes set, put in, taken out, flipped, cut off, names of JSON doubled."""
    return lambda chance: damage(chance, chance.choice(contents))


def damage(chance: random.Random, content: bytes) -> bytes:
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        at = chance.randint(0, len(content))
        token = chance.choice(TOKENS) if chance.random() < 0.7 else chance.randbytes(chance.randint(1, 4))
        match chance.randrange(7):
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
                flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in content[at : at + 1])
                content = content[:at] + flipped + content[at + 1 :]
            case 6:
                content = _renamed(content, chance.randrange(1 << 16))
    return content


def _renamed(content: bytes, place: int) -> bytes:
    """A JSON text in which one name is another's: it stands twice."""
    names = list(_NAME.finditer(content))
    if len(names) < 2:
        return content
    one, other = names[place % len(names)], names[place // len(names) % len(names)]
    return content[: one.start(1)] + other[1] + content[one.end(1) :]


def any_value(chance: random.Random, depth: int = 3) -> Any:
    """A value of JSON, odd ones more often than not."""
    match chance.randrange(8 if depth else 6):
        case 6:
            return [any_value(chance, depth - 1) for _ in range(chance.randrange(4))]
        case 7:
            return {chance.choice(ODD_TEXTS): any_value(chance, depth - 1) for _ in range(chance.randrange(4))}
        case 4:
            return chance.choice((chance.randint(-100, 100), chance.getrandbits(70), chance.uniform(-9, 9)))
        case 5:
            return any_text(chance)
    return chance.choice(ODD_VALUES)


def any_text(chance: random.Random, most: int = 8) -> str:
    highest = chance.choice((0x7E, 0x7E, 0xFF, 0x2FFF, 0x10FFFF))
    return "".join(chr(chance.randint(0, highest)) for _ in range(chance.randrange(most + 1)))


def changed(*documents: Any) -> Callable[[random.Random], Any]:
    """One of the documents, of mappings and lists, with one or two changes: values replaced, keys taken out, renamed, added."""
    return lambda chance: change(chance, chance.choice(documents))


def change(chance: random.Random, document: Any) -> Any:
    for _ in range(chance.choice((1, 1, 2))):
        paths = list(_paths(document))
        document = _edited(document, chance.choice(paths), chance.randrange(6), any_value(chance))
    return document


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
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


def json_file(chance: random.Random, *documents: Any) -> bytes:
    """A file of JSON: of a changed document, or damaged text."""
    document = chance.choice(documents)
    return as_json(change(chance, document)) if chance.random() < 0.6 else damage(chance, as_json(document))


def json_files(*documents: Any) -> Callable[[random.Random], bytes]:
    return lambda chance: json_file(chance, *documents)
