"""The errors that people see: one line that names the setting, the value and the mend."""

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """The recipe or the call is wrong. One line: the setting, the value, the mend. The command exits 2."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known words when none is near."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def one_line(message: str, most: int = 300) -> str:
    """The message on one line, cut in its middle: the setting stands at the start, the mend at the end."""
    line = " ".join(message.split())
    if len(line) <= most:
        return line
    kept = most - len(" ... ")
    return f"{line[: kept - kept // 2]} ... {line[-(kept // 2) :]}"
