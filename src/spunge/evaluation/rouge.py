"""ROUGE-L of answers against what should stand there: the longest common subsequence of words (Lin 2004), by the package
rouge-score.

`ascii` is how that package and every published table read words: runs of a-z and 0-9, whatever the case; all other letters are
left out. `unicode` is for other scripts: runs of letters and digits of any script, and single characters where words are written
without spaces between them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from spunge.errors import RecipeError
from spunge.evaluation.wording import UNSPACED

Words = Literal["ascii", "unicode"]
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
READABLE = 0.5  # of a text's letters; with fewer of them left, its ROUGE says nothing


class Overlap(NamedTuple):
    """Of an answer with its reference, each in [0, 1]."""

    recall: float
    f1: float


class UnicodeWords:
    """What rouge-score calls a tokenizer, for scripts beyond a-z."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def rouge_l(words: Words, stemmed: bool, setting: str) -> Callable[[str, str], Overlap]:
    """(reference, answer) -> ROUGE-L. stemmed: by Porter's stemmer, of `ascii` words. Raises RecipeError without the package."""
    scoring = _package(setting)
    scorer = scoring.RougeScorer(
        ["rougeL"], use_stemmer=stemmed, tokenizer=UnicodeWords() if words == "unicode" else None
    )

    def overlap(reference: str, answer: str) -> Overlap:
        score = scorer.score(reference, answer)["rougeL"]
        return Overlap(float(score.recall), float(score.fmeasure))

    return overlap


def refuse_unreadable(references: Sequence[str], numbers: Sequence[int], words: Words, setting: str) -> None:
    """Raises RecipeError, with the row's number, for a reference of which hardly a word is left, and without the package."""
    _package(setting)
    for reference, number in zip(references, numbers, strict=True):
        letters = [letter for letter in reference if letter.isalnum()]
        read = letters if words == "unicode" else [letter for letter in letters if letter.isascii()]
        if not read:
            mend = "; set words to unicode" if letters else "; filter it out with where"
            raise RecipeError(f"{setting}: row {number} has no word for ROUGE{mend}")
        if len(read) < READABLE * len(letters):
            raise RecipeError(
                f"{setting}: row {number}: ROUGE leaves out every letter but a-z, which are most of this text; set words to unicode"
            )


def _package(setting: str) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise RecipeError(f"{setting}: rouge-score is not installed; pip install 'spunge[judge]'") from None
    return rouge_scorer
