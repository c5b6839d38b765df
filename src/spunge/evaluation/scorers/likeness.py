"""How near a text is to the answer that was to be forgotten: ROUGE-L, BLEU, and the cosine of sentence embeddings.

    - {kind: leakage, source: questions.jsonl, answer: answer, leaks: scorer, scorer: bleu}
    unlearn: {method: demem, scorer: {kind: similarity, encoder: sentence-transformers/all-MiniLM-L6-v2}}

Each needs `reference` beside the text, which `leakage` knows, and the methods that are rewarded by a scorer.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from spunge.errors import RecipeError
from spunge.evaluation.rouge import Words, refuse_unreadable, rouge_l
from spunge.evaluation.scorers.classifiers import fingerprint_of
from spunge.evaluation.scorers.scorer import Answer, Loaded, Scorer
from spunge.evaluation.similarity import ENCODER, load_encoder, similarities
from spunge.recipe.block import Place
from spunge.recipe.scoring import ScorerSettings

SETTING = "evaluate.scorer"
Compare = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # texts, their references -> (n,) in [0, 1]


class RougeSettings(ScorerSettings):
    kind: str = "rouge"
    measure: Literal["recall", "f1"] = Field(
        "f1", description="recall: how much of the reference the text gives. f1: that, and how little else it says."
    )
    words: Words = Field("unicode", description="What counts as a word: a-z and 0-9 alone, or letters of any script.")


class BleuSettings(ScorerSettings):
    kind: str = "bleu"
    tokenize: Literal["13a", "intl", "char", "zh"] = Field(
        "13a", description="How SacreBLEU reads words; char and zh for scripts without spaces between words."
    )


class SimilaritySettings(ScorerSettings):
    kind: str = "similarity"
    encoder: Annotated[str, Place("model")] = Field(
        ENCODER, description="Sentence-transformers model that embeds the texts: folder or Hub id."
    )
    encoder_revision: str | None = Field(None, description="Branch, tag or commit of the encoder on the Hub.")


def load_rouge(settings: RougeSettings) -> Loaded:
    """ROUGE-L of a text with its reference."""
    overlap = rouge_l(settings.words, False, SETTING)

    def score(text: str, reference: str) -> float:
        found: float = overlap(reference, text)._asdict()[settings.measure]
        return found

    return comparing("rouge", pair_by_pair(score, settings.words))


def load_bleu(settings: BleuSettings) -> Loaded:
    """BLEU of a text with its reference, sentence by sentence (SacreBLEU, effective order)."""
    try:
        import sacrebleu
    except ImportError:
        raise RecipeError(f"{SETTING}: sacrebleu is not installed; pip install 'spunge[judge]'") from None
    bleu = sacrebleu.BLEU(effective_order=True, tokenize=settings.tokenize)

    def score(text: str, reference: str) -> float:
        return min(1.0, float(bleu.sentence_score(text, [reference]).score) / 100)

    return comparing("bleu", pair_by_pair(score, "unicode"))


def load_similarity(settings: SimilaritySettings) -> Loaded:
    """Cosine of the sentence embeddings of a text and its reference; 0 where it is below."""
    encoder = load_encoder(settings.encoder, settings.encoder_revision, None, f"{SETTING}.encoder")

    def compare(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        [cosines] = similarities(encoder, [[text] for text in texts], [[[text] for text in references]])
        clipped: np.ndarray = cosines.clip(0.0, 1.0)
        return clipped

    return comparing("similarity", compare)


def pair_by_pair(score: Callable[[str, str], float], words: Words) -> Compare:
    """Each text beside its own reference, of which some word must be readable."""

    def compare(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        refuse_unreadable(references, range(1, len(references) + 1), words, f"{SETTING}: reference")
        return np.array([score(text, reference) for text, reference in zip(texts, references, strict=True)])

    return compare


def comparing(kind: str, compare: Compare) -> Loaded:
    """A scorer of texts beside their references. Raises RecipeError for a text that has none."""

    def score(answers: Sequence[Answer]) -> np.ndarray:
        if not answers:
            return np.zeros(0)
        if any(answer.reference is None for answer in answers):
            raise RecipeError(unknown(kind))
        return compare([answer.text for answer in answers], [answer.reference or "" for answer in answers])

    return Loaded(lambda texts: score([Answer(text) for text in texts]), score_answers=score)


def unknown(kind: str) -> str:
    return (
        f"{SETTING}: {kind!r} compares texts with a reference, and this evaluation knows none; give a scorer of texts alone, or an "
        "evaluation whose rows have an answer (leakage)"
    )


def needs_reference(settings: ScorerSettings, fields: frozenset[str]) -> None:
    """Raises RecipeError where no reference stands beside the texts."""
    if "reference" not in fields:
        raise RecipeError(unknown(settings.kind))


def check_loaded(load: Callable[[Any], Loaded]) -> Callable[[Any, frozenset[str]], None]:
    """The same, and that it can be loaded."""

    def check(settings: Any, fields: frozenset[str]) -> None:
        needs_reference(settings, fields)
        load(settings)

    return check


def similarity_instrument(settings: SimilaritySettings) -> dict[str, Any]:
    """The encoder and what tells its weights from others."""
    revision = fingerprint_of(settings.encoder, settings.encoder_revision, f"{SETTING}.encoder")
    return {"scorer": "similarity", "encoder": settings.encoder, "revision": revision}


ROUGE = Scorer(
    settings=RougeSettings,
    source="Lin 2004; rouge-score",
    load=load_rouge,
    instrument=lambda settings: {"scorer": "rouge", "measure": settings.measure, "words": settings.words},
    check=check_loaded(load_rouge),
    compares=True,
)
BLEU = Scorer(
    settings=BleuSettings,
    source="Post 2018, arXiv 1804.08771; sacrebleu",
    load=load_bleu,
    instrument=lambda settings: {"scorer": "bleu", "tokenize": settings.tokenize},
    check=check_loaded(load_bleu),
    compares=True,
)
SIMILARITY = Scorer(
    settings=SimilaritySettings,
    source="Reimers and Gurevych 2019, arXiv 1908.10084",
    load=load_similarity,
    instrument=similarity_instrument,
    check=needs_reference,
    compares=True,
)
