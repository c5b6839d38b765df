"""Multiple choice: the candidate with the highest length-normalised log-likelihood after the prompt is the answer.

Length normalisation as in Brown et al. 2020 (section 2.4): the sum of a candidate's log-probabilities divided by its
length. Candidates are appended to the prompt as they are, after `separator`.
"""

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from spunge.evaluation.candidates import candidate_likelihoods, question_of
from spunge.evaluation.evaluator import Bench, Measure
from spunge.evaluation.likelihood import Likelihood, likelihoods
from spunge.models import Base
from spunge.recipe import EvaluatorSettings
from spunge.registry import RecipeError
from spunge.texts import Encoded, Text, encode


class ChoicesSettings(EvaluatorSettings):
    kind: Literal["choices"] = "choices"
    question: str = Field("question", description="Column or SQL expression: the prompt, a question or a cloze.")
    choices: str = Field("choices", description="Column or SQL expression: the list of candidates.")
    answer: str = Field(
        "answer", description="Column or SQL expression: the right one, as index from 0, letter or text."
    )
    separator: str = Field(" ", description="Goes between prompt and candidate.")
    normalize: Literal["tokens", "characters", "none"] = Field(
        "tokens", description="Length that a log-likelihood is divided by."
    )
    max_length: int = Field(2048, ge=2, description="Tokens of prompt and candidate; a longer prompt loses its start.")


class Choices:
    """Accuracy on multiple-choice questions, by length-normalised log-likelihood."""

    Settings: ClassVar[type[EvaluatorSettings]] = ChoicesSettings
    version: ClassVar[int] = 1

    @staticmethod
    def columns(settings: ChoicesSettings, forget: Mapping[str, str]) -> dict[str, str]:
        return {"question": settings.question, "choices": settings.choices, "answer": settings.answer}

    @staticmethod
    def measure(base: Base, settings: ChoicesSettings, items: pa.Table, bench: Bench) -> list[Measure]:
        rows = items.to_pylist()
        answers = [answer_index(row["answer"], row["choices"], number) for number, row in enumerate(rows)]
        texts = [
            Text(row["question"], settings.separator + str(candidate)) for row in rows for candidate in row["choices"]
        ]
        encoded = [encode(text, base.tokenizer, settings.max_length) for text in texts]
        found = iter(
            zip(
                texts,
                all_likelihoods(base, encoded, [len(row["choices"]) for row in rows], bench.progress),
                strict=True,
            )
        )
        right = np.zeros(len(rows))
        for number, row in enumerate(rows):
            scores = [normalised(*next(found), settings) for _ in row["choices"]]
            right[number] = float(int(np.argmax(scores)) == answers[number])
        return [Measure("accuracy", right, np.ones(len(rows)), higher_is_better=True)]


def all_likelihoods(
    base: Base, encoded: Sequence[Encoded], counts: Sequence[int], progress: Callable[[int, int], None]
) -> list[Likelihood]:
    """Of every candidate, item after item (`counts` of each): with a shared prompt where its tokens are the same."""
    starts = [0, *itertools.accumulate(counts)]
    items = [encoded[start:stop] for start, stop in itertools.pairwise(starts)]
    questions = [question_of(item) for item in items]
    shared = candidate_likelihoods(base, [question for question in questions if question], progress)
    apart = likelihoods(
        base, [text for item, question in zip(items, questions, strict=True) if not question for text in item], progress
    )
    together, alone = iter(shared), iter(apart)
    found: list[Likelihood] = []
    for item, question in zip(items, questions, strict=True):
        found += next(together) if question else [next(alone) for _ in item]
    return found


def normalised(text: Text, likelihood: Likelihood, settings: ChoicesSettings) -> float:
    """A candidate's log-likelihood per token, per character, or in all."""
    if settings.normalize == "none":
        return likelihood.log
    length = (
        likelihood.tokens if settings.normalize == "tokens" else len(text.completion.removeprefix(settings.separator))
    )
    return likelihood.log / max(1, length)


def answer_index(answer: Any, choices: Any, row: int) -> int:
    """The right candidate's index, given as a number, a letter, or the candidate itself. Raises RecipeError otherwise."""
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecipeError(f"evaluate.choices: row {row} has no list of two candidates or more")
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer.upper() in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(answer.upper())
        elif answer.isdigit():
            answer = int(answer)
    if isinstance(answer, int | float) and answer == int(answer) and 0 <= answer < len(choices):
        return int(answer)
    raise RecipeError(f"evaluate.answer: row {row}: {answer!r} is none of its {len(choices)} candidates")
