"""Multiple choice: the candidate with the highest length-normalised log-likelihood after the prompt is the answer.

Length normalisation as in Brown et al. 2020 (section 2.4): the sum of a candidate's log-probabilities divided by its
length. Candidates are appended to the prompt as they are, after `separator`.

With `style: letter` the options are listed under the question and their letters are the candidates, as in MMLU (Hendrycks
et al. 2021) and WMDP (Li et al. 2024); the prompt is the one of lm-evaluation-harness's tasks mmlu and wmdp.
"""

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.samples import Encoded, Text, encode
from spunge.errors import RecipeError
from spunge.evaluation.candidates import candidate_likelihoods, question_of
from spunge.evaluation.evaluator import Bench, Evaluator, Measure
from spunge.evaluation.likelihood import Likelihood, likelihoods
from spunge.model.loading import Base
from spunge.progress import Steps
from spunge.recipe.schema import EvaluatorSettings


class ChoicesSettings(EvaluatorSettings):
    kind: str = "choices"
    question: str = Field("question", description="Column or SQL expression: the prompt, a question or a cloze.")
    choices: str = Field("choices", description="Column or SQL expression: the list of candidates.")
    answer: str = Field(
        "answer", description="Column or SQL expression: the right one, as index from 0, letter or text."
    )
    style: Literal["cloze", "letter"] = Field(
        "cloze",
        description="cloze: the candidates' own texts follow the prompt. letter: the options are listed under the question as "
        "A., B., ..., then `Answer:`, and their letters are the candidates, as in MMLU and WMDP.",
    )
    description: str = Field(
        "",
        description="Text before every prompt, such as `The following are multiple choice questions (with answers) about "
        "biology.` and an empty line, which MMLU and WMDP begin with.",
    )
    orders: int = Field(
        1,
        ge=1,
        description="Ask each question in so many rotations of its options (at most as many as it has) and average, against a "
        "liking for a letter. With style letter alone.",
    )
    separator: str = Field(" ", description="Goes between prompt and candidate.")
    normalize: Literal["tokens", "characters", "none"] = Field(
        "tokens", description="Length that a log-likelihood is divided by."
    )
    max_length: int = Field(2048, ge=2, description="Tokens of prompt and candidate; a longer prompt loses its start.")

    @model_validator(mode="after")
    def _orders_are_seen(self) -> "ChoicesSettings":
        if self.orders > 1 and self.style == "cloze":
            raise ValueError("orders: a cloze does not show its options, so their order is nothing; set style: letter")
        return self


class Asked(NamedTuple):
    """A question as it is put to the model."""

    row: int
    prompt: str
    candidates: list[str]
    answer: int


def columns(settings: ChoicesSettings, forget: Mapping[str, str]) -> dict[str, str]:
    return {"question": settings.question, "choices": settings.choices, "answer": settings.answer}


def measure(base: Base, settings: ChoicesSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Accuracy on multiple-choice questions, by length-normalised log-likelihood."""
    asked = [each for number, row in enumerate(items.to_pylist()) for each in questions(row, number, settings)]
    texts = [Text(each.prompt, settings.separator + text) for each in asked for text in each.candidates]
    encoded = [encode(text, base.tokenizer, settings.max_length) for text in texts]
    counts = [len(each.candidates) for each in asked]
    found = iter(zip(texts, all_likelihoods(base, encoded, counts, bench.progress), strict=True))
    right, times, chance = (np.zeros(items.num_rows) for _ in range(3))
    for each in asked:
        scores = [normalised(*next(found), settings) for _ in each.candidates]
        right[each.row] += float(int(np.argmax(scores)) == each.answer)
        times[each.row] += 1
        chance[each.row] = 1 / len(each.candidates)
    share = float(chance.mean()) if len(chance) else None
    return [Measure("accuracy", right / times, np.ones(len(right)), higher_is_better=True, chance=share)]


def questions(row: Mapping[str, Any], number: int, settings: ChoicesSettings) -> list[Asked]:
    """A row as the questions that are asked: one, or one for each rotation of its options."""
    options = listed(row["choices"])
    answer = answer_index(row["answer"], options, number)
    if settings.style == "cloze":
        return [Asked(number, settings.description + row["question"], [str(option) for option in options], answer)]
    if len(options) > len(string.ascii_uppercase):
        raise RecipeError(f"evaluate.style: row {number} has {len(options)} options, more than there are letters")
    letters = list(string.ascii_uppercase[: len(options)])
    asked = []
    for shift in range(min(settings.orders, len(options))):
        turned = options[shift:] + options[:shift]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True)]
        prompt = "\n".join([settings.description + row["question"].strip(), *lines, "Answer:"])
        asked.append(Asked(number, prompt, letters, (answer - shift) % len(options)))
    return asked


def all_likelihoods(base: Base, encoded: Sequence[Encoded], counts: Sequence[int], progress: Steps) -> list[Likelihood]:
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


def listed(choices: Any) -> Any:
    """A list of candidates that came as an array or a tuple, as a list; anything else as it is."""
    if isinstance(choices, np.ndarray):
        return choices.tolist()
    return list(choices) if isinstance(choices, tuple) else choices


def answer_index(answer: Any, choices: Any, row: int) -> int:
    """The right candidate's index, given as a number, a letter, or the candidate itself, also as the only one in a list.

    Raises RecipeError otherwise."""
    choices = listed(choices)
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecipeError(f"evaluate.choices: row {row} has no list of two candidates or more")
    if isinstance(answer, np.ndarray | np.generic):
        answer = answer.tolist()
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
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


CHOICES = Evaluator(
    settings=ChoicesSettings,
    source="Brown et al. 2020, arXiv 2005.14165, section 2.4",
    measure=measure,
    columns=columns,
    version=2,
)
