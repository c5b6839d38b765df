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
