"""How names and numbers are shown: names short, on one line, in columns; numbers to the digits they bear."""

import math
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from spunge.errors import printable

MISSING = "–"


def name(value: object) -> str:
    """A value as a name of one line; an empty one says so."""
    return printable(value).strip() or "(empty)"


def shortened(text: str, columns: int) -> str:
    """The text in at most so many columns; a cut keeps both ends, where names that share a beginning differ."""
    if cell_len(text) <= columns:
        return text
    start = len(text)
    while cell_len(text[start - 1 :]) <= (columns - 1) // 3:
        start -= 1
    head = set_cell_size(text, columns - 1 - cell_len(text[start:]))
    return f"{head.rstrip()}…{text[start:]}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns two spaces apart, each line with its end."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell + " " * (columns - cell_len(cell)) for cell, columns in zip(line, widths, strict=True))
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
