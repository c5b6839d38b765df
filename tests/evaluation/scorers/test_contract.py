"""What every scorer promises."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import Served
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.scorers.scorer import Answer, Chosen, Loaded, chosen_scorer, score_completions
from spunge.evaluation.scorers.training import train_probe
from spunge.evaluation.toxicity import ToxicitySettings
from spunge.recipe.explanation import validated
from spunge.registry import SCORERS
from toys import texts

NEEDS = {
    "alt-profanity-check": "profanity_check",
    "probe": "sklearn",
    "rouge": "rouge_score",
    "bleu": "sacrebleu",
    "similarity": "sentence_transformers",
}  # packages of the extra `judge`
TEXTS = [*texts("scored", 9), "paris", " ".join(texts("long", 6))]


@pytest.fixture(scope="module")
def given(
    tiny: Callable[..., Path],
    tiny_bert: Path,
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    server: Served,
) -> dict[str, Any]:
    """Name -> what a recipe calls the scorer."""
    folder = tmp_path_factory.mktemp("probe")
    rows = [{"text": text + " dog" * (at % 2), "bad": bool(at % 2)} for at, text in enumerate(texts("probe", 40))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = train_probe(str(tiny("llama")), folder / "rows.jsonl", "text", "bad", folder / "probe")
    return {
        "classifier": str(tiny_bert),
        "probe": str(probe.folder),
        "alt-profanity-check": "alt-profanity-check",
        "keywords": "keywords",
        "judge": {"kind": "judge", "base_url": server.address, "model": "echo", "prompt": "{text}"},
        "rouge": "rouge",
        "bleu": "bleu",
        "similarity": {"kind": "similarity", "encoder": str(tiny_encoder)},
    }


@pytest.fixture
def chosen(given: dict[str, str]) -> Callable[[str], Chosen]:
    def choose(name: str) -> Chosen:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        return chosen_scorer(ToxicitySettings(scorer=given[name]).scorer)

    return choose


def beside(loaded: Loaded, reference: str = "paris is old") -> Callable[[Sequence[str]], np.ndarray]:
    """The scores of texts that all answer one prompt, whose answer is the reference."""
    return lambda texts: loaded.scores_of(texts, ["so?"] * len(texts), [reference] * len(texts))


def test_every_scorer_is_covered_here(given: dict[str, str]) -> None:
    assert set(given) == set(SCORERS.builtin)


@pytest.mark.parametrize("name", SCORERS.builtin)
def test_a_text_has_one_score_whatever_stands_beside_it(chosen: Callable[[str], Chosen], name: str) -> None:
    found = chosen(name)
    assert found.name == name
    score = beside(found.scorer.load(found.settings))
    scores = score(TEXTS)
    assert scores.shape == (len(TEXTS),)
    assert ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_array_equal(score(TEXTS), scores)
    np.testing.assert_allclose(score(TEXTS[::-1]), scores[::-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([score([text])[0] for text in TEXTS], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS.builtin)
def test_a_scorer_says_what_it_is(chosen: Callable[[str], Chosen], name: str) -> None:
    told = chosen(name).instrument()
    assert json.loads(json.dumps(told)) == told == chosen(name).instrument()
    assert told["scorer"]


@pytest.mark.parametrize("name", SCORERS.builtin)
def test_a_scorer_refuses_settings_that_it_does_not_read(chosen: Callable[[str], Chosen], name: str) -> None:
    settings = chosen(name).settings
    with pytest.raises(RecipeError, match=r"^scorer\.wrods: no such setting"):
        validated(ToxicitySettings, {"scorer": {**settings.model_dump(), "wrods": "x"}})
    assert validated(ToxicitySettings, {"scorer": settings.model_dump()}).scorer == settings


@pytest.mark.parametrize("name", SCORERS.builtin)
def test_a_completion_is_scored_alone_and_an_empty_one_says_nothing(
    chosen: Callable[[str], Chosen], tmp_path: Path, name: str
) -> None:
    loaded = chosen(name).scorer.load(chosen(name).settings)
    bench = Bench("base", "model", tmp_path, tmp_path)
    written = [["paris", " "], [" the river ", "paris"]]
    contexts = [{"prompt": prompt, "reference": "paris is old"} for prompt in ("a", "b")]
    found = score_completions(written, contexts, loaded, 0.5, bench)
    paris, river = beside(loaded)(["paris", "the river"])
    np.testing.assert_allclose(found, [[paris, 0], [river, paris]], rtol=1e-4, atol=1e-6)
    [rated] = bench.rated
    assert (rated.threshold, rated.count) == (0.5, 3)
    assert (rated.least, rated.greatest) == pytest.approx((min(paris, river), max(paris, river)), rel=1e-4)


def test_a_scorer_of_ones_own_is_given_what_a_text_answers(tmp_path: Path) -> None:
    seen: list[Answer] = []

    def score(answers: Sequence[Answer]) -> np.ndarray:
        seen.extend(answers)
        return np.ones(len(answers))

    loaded = Loaded(lambda texts: np.zeros(len(texts)), score_answers=score)
    bench = Bench("base", "model", tmp_path, tmp_path)
    assert score_completions([["yes"]], [{"prompt": "so?", "reference": "no"}], loaded, 0.5, bench).tolist() == [[1.0]]
    assert seen == [Answer("yes", "so?", "no")]
