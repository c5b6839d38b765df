"""The scorers that compare a text with its reference, beside their measures by hand."""

from pathlib import Path

import pytest

from spunge.errors import RecipeError
from spunge.evaluation.leakage import LeakageSettings
from spunge.evaluation.scorers.scorer import chosen_scorer
from spunge.evaluation.toxicity import ToxicitySettings

TRUE, TEXT = "the cat sat on a mat", "the cat sat on the mat"


def scores(scorer: object, texts: list[str], references: list[str]) -> list[float]:
    chosen = chosen_scorer(ToxicitySettings(scorer=scorer).scorer)
    found: list[float] = chosen.scorer.load(chosen.settings).scores_of(texts, texts, references).tolist()
    return found


def test_rouge_is_the_longest_common_subsequence_as_a_share_of_the_words() -> None:
    pytest.importorskip("rouge_score")
    assert scores("rouge", [f"{TEXT} today so", "dog"], [TRUE, TRUE]) == pytest.approx([2 * 5 / (6 + 8), 0])
    assert scores({"kind": "rouge", "measure": "recall"}, [f"{TEXT} today so"], [TRUE]) == pytest.approx([5 / 6])
    assert scores("rouge", ["кот спит"], ["кот спит"]) == [1.0]


def test_bleu_is_the_geometric_mean_of_the_precisions_of_one_to_four_words() -> None:
    pytest.importorskip("sacrebleu")
    by_hand = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert scores("bleu", [TEXT, TRUE, "dog"], [TRUE] * 3) == pytest.approx([by_hand, 1.0, 0.0])


def test_similarity_is_the_cosine_where_it_is_not_below_zero(tiny_encoder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["the river", "paris", "the river"]
    encoder = SentenceTransformer(str(tiny_encoder), device="cpu")
    given = encoder.encode([*texts, "the river"], normalize_embeddings=True).astype("float64")
    found = scores({"kind": "similarity", "encoder": str(tiny_encoder)}, texts, ["the river"] * 3)
    assert found == pytest.approx((given[:3] @ given[3]).clip(0, 1).tolist(), abs=1e-5)
    assert found[0] == pytest.approx(1.0)


@pytest.mark.parametrize("scorer", ["rouge", "bleu", "similarity"])
def test_an_evaluation_without_references_is_refused(scorer: str) -> None:
    chosen = chosen_scorer(ToxicitySettings(scorer=scorer).scorer)
    with pytest.raises(RecipeError, match=rf"^evaluate\.scorer: '{scorer}' compares texts with a reference"):
        chosen.check("prompt")
    if scorer != "similarity":  # which a folder or the Hub must have
        chosen_scorer(LeakageSettings(leaks="scorer", scorer=scorer).scorer).check("prompt", "reference")


@pytest.mark.parametrize("scorer", ["rouge", "bleu"])
def test_a_reference_without_a_word_is_refused(scorer: str) -> None:
    with pytest.raises(RecipeError, match="row 2 has no word for ROUGE"):
        scores(scorer, ["a", "b"], ["a", "..."])
