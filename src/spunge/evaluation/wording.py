"""Words in texts, whatever their case, their spacing and their Unicode form."""

import re
import unicodedata
from collections.abc import Callable, Sequence

from spunge.data.patterns import QUOTES

# Thai to Burmese, Khmer, kana, Chinese characters: scripts that put no spaces between words. Of a character class.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LETTER = rf"[^\W{UNSPACED}]"  # that belongs to the word beside it
AROUND = " .,;:!?\"'…。、！？()[]*"  # what stands around an answer and says nothing


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
