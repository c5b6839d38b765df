"""Regular expressions of a recipe, searched for in texts: each search comes to an end, or is refused."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import regex

from spunge.errors import RecipeError

QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"'})
SECONDS = 2.0  # of one search; those that people write take microseconds


def matches(patterns: Sequence[str], setting: str) -> Callable[[str], bool]:
    """text -> whether a regular expression is found in it, whatever the case. `(?-i:Paris)` minds it.

    Raises RecipeError for what is none, for one that is found in every text, and, from the function, for one that does not end.
    """
    compiled = [_compiled(pattern, setting) for pattern in patterns]

    def found(text: str) -> bool:
        said = unicodedata.normalize("NFKC", text.translate(QUOTES))
        return any(_searched(pattern, said, setting) for pattern in compiled)

    return found


@lru_cache(maxsize=1024)
def _compiled(pattern: str, setting: str) -> Any:
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE)
    except (regex.error, RecursionError, OverflowError) as error:
        raise RecipeError(f"{setting}: {pattern!r} is no regular expression: {error}") from None
    if _searched(compiled, "", setting):
        raise RecipeError(
            f"{setting}: {pattern!r} is found in an empty text, and so in every one; write what has to be there"
        )
    return compiled


def last_group(pattern: str, text: str, setting: str) -> str:
    """What a regular expression's one group says, the last time that it matches; empty where it never does.

    Raises RecipeError where it does not end.
    """
    try:
        said = regex.findall(pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise _endless(pattern, text, setting) from None
    return str(said[-1]) if said else ""


def _searched(pattern: Any, text: str, setting: str) -> bool:
    try:
        return pattern.search(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise _endless(pattern.pattern, text, setting) from None


def _endless(pattern: str, text: str, setting: str) -> RecipeError:
    return RecipeError(
        f"{setting}: {pattern!r} was not done with a text of {len(text)} characters after {SECONDS:g} s; write it without a "
        "repetition in a repetition"
    )
