"""How names and numbers are shown: data made safe for a page and a terminal, numbers to the digits they bear."""

import math
import unicodedata
from collections.abc import Iterable, Sequence

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
MISSING = "–"


def clean(value: object, keep: str = "") -> str:
    """Text of one line: control characters (a terminal obeys them, XML forbids them) become a visible mark.

    Lone surrogates go the same way, since no file can hold them. Directional overrides are taken out: they would
    reorder what stands around the value. `keep` names control characters to leave.
    """
    return "".join(
        character
        if character in keep
        else " "
        if character in "\n\t"
        else "\N{REPLACEMENT CHARACTER}"
        if _unprintable(character)
        else character
        for character in str(value)
        if ord(character) not in _BIDI
    )


def name(value: object) -> str:
    """A value as a name of one line; an empty one says so."""
    return clean(value).strip() or "(empty)"


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in (0xFFFE, 0xFFFF)


def width(text: str) -> int:
    """Columns that a text takes: two for a wide character (CJK), none for a combining one."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def shortened(text: str, columns: int) -> str:
    """The text in at most so many columns; a cut keeps both ends, where names that share a beginning differ."""
    if width(text) <= columns:
        return text
    tail = _fitting(reversed(text), (columns - 1) // 3)
    head = _fitting(text, columns - 1 - width(tail))
    return f"{head}…{tail[::-1]}"


def _fitting(characters: Iterable[str], columns: int) -> str:
    taken = ""
    for character in characters:
        if width(taken + character) > columns:
            break
        taken += character
    return taken


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns two spaces apart, each line with its end."""
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell + " " * (columns - width(cell)) for cell, columns in zip(line, widths, strict=True))
        for line in lines
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)


def isolated(value: object, columns: int = 60) -> str:
    """A name for the middle of a sentence: short, and its direction of writing kept to itself."""
    return f"\N{FIRST STRONG ISOLATE}{shortened(name(value), columns)}\N{POP DIRECTIONAL ISOLATE}"


def unisolated(text: str) -> str:
    """Without the marks of direction, which a terminal may show as boxes."""
    return text.translate({ord("\N{FIRST STRONG ISOLATE}"): None, ord("\N{POP DIRECTIONAL ISOLATE}"): None})


def number(value: float | None, share: bool = False, digits: int = 2) -> str:
    """A share with `digits` decimals; anything else with at least three figures that count."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if share or size == 0:
        return f"{value:.{digits}f}"
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}"


def signed(value: float, share: bool = False, digits: int = 2) -> str:
    """A difference, its sign always shown; one that rounds to nothing has none."""
    text = number(abs(value), share, digits)
    if not text.strip("0."):
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s, 3 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a whole part."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
