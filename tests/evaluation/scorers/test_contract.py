"""What every scorer promises."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spunge.errors import RecipeError
from spunge.evaluation.scorers.scorer import Chosen, chosen_scorer
from spunge.evaluation.scorers.training import train_probe
from spunge.registry import SCORERS
from toys import texts

NEEDS = {"alt-profanity-check": "profanity_check", "probe": "sklearn"}  # packages of the extra `judge`
TEXTS = [*texts("scored", 9), "paris", " ".join(texts("long", 6))]


@pytest.fixture(scope="module")
def given(tiny: Callable[..., Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what a recipe calls the scorer."""
    folder = tmp_path_factory.mktemp("probe")
    rows = [{"text": text + " dog" * (at % 2), "bad": bool(at % 2)} for at, text in enumerate(texts("probe", 40))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = train_probe(str(tiny("llama")), folder / "rows.jsonl", "text", "bad", folder / "probe")
    return {
        "classifier": str(tiny_bert),
        "probe": str(probe.folder),
        "alt-profanity-check": "alt-profanity-check",
    }


@pytest.fixture
def chosen(given: dict[str, str]) -> Callable[[str], Chosen]:
    def choose(name: str) -> Chosen:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        return chosen_scorer({"scorer": given[name]})

    return choose


def test_every_scorer_is_covered_here(given: dict[str, str]) -> None:
    assert set(given) == set(SCORERS.builtin)


@pytest.mark.parametrize("name", SCORERS.builtin)
def test_a_text_has_one_score_whatever_stands_beside_it(chosen: Callable[[str], Chosen], name: str) -> None:
    found = chosen(name)
    assert found.name == name
    score = found.scorer.load(found.settings).score
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
def test_a_scorer_refuses_settings_that_it_does_not_read(
    chosen: Callable[[str], Chosen], given: dict[str, str], name: str
) -> None:
    known: Any = chosen(name).scorer.settings.model_fields
    for setting in ("scorer_revision", "label", "words"):
        if setting in known:
            assert dict(chosen_scorer({"scorer": given[name], setting: "x"}).settings)[setting] == "x"
        else:
            with pytest.raises(RecipeError, match=rf"^evaluate\.{setting}: the scorer {name} has no use for it"):
                chosen_scorer({"scorer": given[name], setting: "x"})
