"""Templates of the user's: a text with columns in braces, such as `### Question: {question}`. Doubled braces are text."""

import re
import string

from spunge.errors import RecipeError

FIELD = re.compile(r"(?<!\{)(?:\{\{)*\{([^{}'\":]+)\}")  # a name in single braces


def pieces_of(template: str, setting: str) -> list[tuple[str, str | None]]:
    """The template's texts, and the columns between them: (text, None) or ("", column). Raises RecipeError where braces do not
    match, or hold more than a name."""
    pieces: list[tuple[str, str | None]] = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        raise RecipeError(
            f"{setting}: the braces of the template {template!r} do not match; braces that are text are doubled: {{{{ }}}}"
        ) from None
    for text, name, form, conversion in parsed:
        if text:
            pieces.append((text, None))
        if name is None:
            continue
        if not name.strip() or form or conversion:
            raise RecipeError(
                f"{setting}: in the braces of the template {template!r} stands a column's name, and nothing else"
            )
        pieces.append(("", name))
    return pieces


def text_sql(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"
