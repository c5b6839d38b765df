"""Who says that a text is toxic: a classifier, a probe of your own, alt-profanity-check, or `path/to/file.py:NAME`.

    WORDS = Scorer(settings=WordsSettings, source="...", load=load, instrument=instrument)

A scorer is what a recipe's `scorer: TEXT` names: by its own name, by what `matches` says of the text, or, where nothing else
does, as a text classifier's folder or Hub id.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from spunge.errors import RecipeError
from spunge.recipe.block import Strict
from spunge.registry import SCORERS, summary_of

DEFAULT = "classifier"


class ScorerSettings(Strict):
    """What a recipe says of the scorer, beside the evaluator's own settings."""

    scorer: str = Field(description="Its name, or the path or Hub id that it is known by.")


S = TypeVar("S", bound=ScorerSettings)


class Loaded(NamedTuple):
    """score: texts -> (n,) in [0, 1]. refuse: raises RecipeError when it was trained on one of the texts."""

    score: Callable[[Sequence[str]], np.ndarray]
    refuse: Callable[[Sequence[str], str], None] = lambda texts, what: None


@dataclass(frozen=True)
class Scorer(Generic[S]):
    """A scorer. Lists say the first line of `load`'s docstring of it."""

    settings: type[S]
    source: str  # the paper, or the package
    load: Callable[[S], Loaded]  # raises RecipeError where it cannot be had
    # What it is, with the revision of its weights: kept in the results, and runs are compared only where it is the same.
    instrument: Callable[[S], dict[str, Any]]
    matches: Callable[[str], bool] = lambda path: False  # whether a recipe's text means it, beside its own name
    version: int = 1  # rises when the same settings give other scores

    @property
    def summary(self) -> str:
        return summary_of(self.load)


class Chosen(NamedTuple):
    """The scorer that a recipe means, and its settings."""

    name: str
    scorer: Scorer[Any]
    settings: ScorerSettings

    def instrument(self) -> dict[str, Any]:
        """What the scorer is, and its version where that is not the first."""
        told = self.scorer.instrument(self.settings)
        version = SCORERS.version(self.name)
        return told if version == "1" else {**told, "version": version}


def chosen_scorer(given: Mapping[str, Any]) -> Chosen:
    """given: `scorer`, and the settings beside it that a scorer may have. Raises RecipeError for one that this scorer has not."""
    name = _name_of(given["scorer"])
    scorer = SCORERS.get(name)
    settings = {setting: value for setting, value in given.items() if value is not None}
    for setting in settings:
        if setting not in scorer.settings.model_fields:
            raise RecipeError(f"evaluate.{setting}: the scorer {name} has no use for it; leave it out")
    return Chosen(name, scorer, scorer.settings.model_validate(settings))


def _name_of(text: str) -> str:
    if ".py:" in text or text in SCORERS.names():
        return text
    return next((name for name, scorer in SCORERS.items() if scorer.matches(text)), DEFAULT)
