"""Who says that a text is toxic, a refusal, a leak: a classifier, a probe of your own, keywords, a judge at an endpoint, a file's.

    scorer: tomh/toxigen_roberta                               # a name, or what it is known by: a folder, a Hub id
    scorer: {kind: classifier, path: tomh/toxigen_roberta, label: LABEL_1}
    scorer: {kind: judge, base_url: http://localhost:8000/v1, model: judge, prompt: "Is this rude? yes or no: {text}", ..}

    WORDS = Scorer(settings=WordsSettings, source="...", load=load, instrument=instrument)

A text names a scorer by the scorer's own name, by what `matches` says of the text, or, where nothing else does, as a text
classifier's folder or Hub id.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from spunge.evaluation.evaluator import Bench, Rated
from spunge.files import fingerprint, write_text
from spunge.recipe.block import Strict
from spunge.recipe.scoring import ScorerSettings
from spunge.registry import SCORERS, summary_of

S = TypeVar("S", bound=ScorerSettings)


class Answer(NamedTuple):
    """A text to be scored, and what it answers where that is known."""

    text: str
    prompt: str | None = None
    reference: str | None = None  # the answer that was to be forgotten, or the right one


class Loaded(NamedTuple):
    """score: texts -> (n,) in [0, 1]. refuse: raises RecipeError when it was trained on one of the texts."""

    score: Callable[[Sequence[str]], np.ndarray]
    refuse: Callable[[Sequence[str], str], None] = lambda texts, what: None
    # The same for texts with what they answer, where that makes a difference.
    score_answers: Callable[[Sequence[Answer]], np.ndarray] | None = None

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:
        """(n,) in [0, 1]."""
        if self.score_answers is not None:
            return self.score_answers(answers)
        return self.score([answer.text for answer in answers])

    def scores_of(self, texts: Sequence[str], prompts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1], of texts with the prompts that they answer and the answers that were to be forgotten."""
        return self.scores([Answer(*each) for each in zip(texts, prompts, references, strict=True)])


@dataclass(frozen=True)
class Scorer(Generic[S]):
    """A scorer. Lists say the first line of `load`'s docstring of it."""

    settings: type[S]
    source: str  # the paper, or the package
    load: Callable[[S], Loaded]  # raises RecipeError where it cannot be had
    # What it is, with the revision of its weights: kept in the results, and runs are compared only where it is the same.
    instrument: Callable[[S], dict[str, Any]]
    matches: Callable[[str], bool] = lambda path: False  # whether a recipe's text means it, beside its own name
    # (settings, which fields of an Answer the evaluator knows). Raises RecipeError where it cannot score: asked before
    # anything is trained.
    check: Callable[[S, frozenset[str]], None] = lambda settings, fields: None
    compares: bool = False  # it scores how near a text is to its reference
    version: int = 1  # rises when the same settings give other scores

    @property
    def summary(self) -> str:
        return summary_of(self.load)


@dataclass(frozen=True)
class Chosen:
    """The scorer that a recipe means, and its settings."""

    name: str
    scorer: Scorer[Any]
    settings: ScorerSettings

    def instrument(self) -> dict[str, Any]:
        """What the scorer is, and its version where that is not the first."""
        told = self.scorer.instrument(self.settings)
        version = SCORERS.version(self.name)
        return told if version == "1" else {**told, "version": version}

    def check(self, *fields: str) -> None:
        """Raises RecipeError where it cannot score texts, with these fields of an Answer beside them."""
        self.scorer.check(self.settings, frozenset(fields))

    def loaded(self, bench: Bench, prompts: Sequence[str]) -> Loaded:
        """The scorer, loaded once however often it is asked for, for completions of these prompts.

        Raises RecipeError where it was trained on one of the prompts or of the forget rows.
        """
        key = ("scorer", self.name, self.settings.model_dump_json())
        loaded: Loaded = bench.judges.get(key, lambda: self.scorer.load(self.settings))
        loaded.refuse(prompts, "prompts that it judges the completions of")
        for samples in bench.forget.values():
            loaded.refuse(samples.words(), "forget rows")
        return loaded


def chosen_scorer(settings: ScorerSettings) -> Chosen:
    """The scorer that a recipe's `scorer` means. Raises RecipeError where nobody has that name."""
    return Chosen(settings.kind, SCORERS.get(settings.kind), settings)


def score_completions(
    written: Sequence[Sequence[str]],
    contexts: Sequence[Mapping[str, str]],
    loaded: Loaded,
    threshold: float,
    bench: Bench,
) -> np.ndarray:
    """(n, samples) in [0, 1] of each item's completions. An empty one says nothing: 0, without being scored.

    contexts: the other fields of an Answer, of each item. On which side of the threshold the scores fell is told to the bench.
    """
    answers = [
        Answer(text.strip(), **context) for texts, context in zip(written, contexts, strict=True) for text in texts
    ]
    said = [at for at, answer in enumerate(answers) if answer.text]
    scores = np.zeros(len(answers))
    if said:
        scores[said] = loaded.scores([answers[at] for at in said])
        bench.rated.append(Rated.of(scores[said], threshold))
    return scores.reshape(len(written), -1)


def keep_scored(settings: Strict, written: Sequence[Sequence[str]], scores: np.ndarray, bench: Bench) -> None:
    """Every completion with its score, beside the texts, to look at."""
    name = fingerprint([bench.model, settings.model_dump(mode="json"), list(map(list, written))])[:16]
    lines = [
        json.dumps({"row": row, "text": text, "score": round(float(score), 4)}, ensure_ascii=False)
        for row, (texts, rated) in enumerate(zip(written, scores, strict=True))
        for text, score in zip(texts, rated, strict=True)
    ]
    file = bench.folder / f"scored-{name}.jsonl"
    write_text(file, "\n".join(lines) + "\n")
    bench.kept.add(file)
