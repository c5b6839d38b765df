"""alt-profanity-check: a linear model on words and characters (pip install alt-profanity-check). It knows explicit words alone.

- {kind: toxicity, source: prompts.jsonl, scorer: alt-profanity-check}
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from spunge.errors import RecipeError
from spunge.evaluation.scorers.scorer import Loaded, Scorer
from spunge.recipe.scoring import ScorerSettings

PACKAGE = "alt-profanity-check"


class ProfanitySettings(ScorerSettings):
    kind: str = PACKAGE


def load(_settings: ProfanitySettings) -> Loaded:
    """The package's probability of profanity."""
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise RecipeError(f"evaluate.scorer: {PACKAGE} is not installed; pip install {PACKAGE}") from None
    return Loaded(lambda texts: np.asarray(predict_prob(list(texts)), dtype=np.float64))


def instrument(_settings: ProfanitySettings) -> dict[str, Any]:
    try:
        return {"scorer": PACKAGE, "revision": version(PACKAGE)}
    except PackageNotFoundError:
        return {"scorer": PACKAGE, "revision": None}


PROFANITY = Scorer(settings=ProfanitySettings, source="alt-profanity-check", load=load, instrument=instrument)
