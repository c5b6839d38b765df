"""Words in texts, whatever their case, their spacing and their Unicode form, and regular expressions that come to an end."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import regex

from spunge.errors import RecipeError

# Thai to Burmese, Khmer, kana, Chinese characters: scripts that put no spaces between words. Of a character class.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LETTER = rf"[^\W{UNSPACED}]"  # that belongs to the word beside it
QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"'})
AROUND = " .,;:!?\"'…。、！？()[]*"  # what stands around an answer and says nothing
SECONDS = 2.0  # of one search; those that people write take microseconds


def plain(text: str) -> str:
    """Without what is no difference: case, runs of white space, compatible forms of Unicode (NFKC), curly quotes."""
    folded = unicodedata.normalize("NFKC", text.translate(QUOTES)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def any_of(words: Sequence[str]) -> Callable[[str], bool]:
    """text -> whether it holds one of the words or phrases as a whole: `art` is not in `party`.

    Where a script puts no spaces between words, any place will do.
    """
    pattern = re.compile("|".join(map(_whole, words)))
    return lambda text: pattern.search(plain(text)) is not None


def _whole(word: str) -> str:
    spelled = plain(word)
    before = rf"(?<!{LETTER})" if re.match(LETTER, spelled) else ""
    after = rf"(?!{LETTER})" if re.search(rf"{LETTER}$", spelled) else ""
    return before + re.escape(spelled) + after


def contains(texts: Sequence[str]) -> Callable[[str], bool]:
    """text -> whether one of the texts stands anywhere in it, inside of words too."""
    wanted = [plain(each) for each in texts]
    return lambda text: any(each in plain(text) for each in wanted)


def equals(texts: Sequence[str]) -> Callable[[str], bool]:
    """text -> whether it is one of the texts, but for white space and punctuation around it."""
    wanted = {plain(each).strip(AROUND) for each in texts}
    return lambda text: plain(text).strip(AROUND) in wanted


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
