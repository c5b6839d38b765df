"""Multiple choice: the candidate with the highest log-likelihood after the prompt is the answer.

`normalize` says what the sum of a candidate's log-probabilities is divided by: nothing (lm-evaluation-harness's acc), its
characters (acc_norm), or its tokens (Brown et al. 2020, section 2.4). Candidates are appended to the prompt as they are, after
`separator`.

With `style: letter` the options are listed under the question and their letters are the candidates, as in MMLU (Hendrycks
et al. 2021) and WMDP (Li et al. 2024); the prompt is the one of lm-evaluation-harness's tasks mmlu and wmdp.
"""

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.query import ROW
from spunge.data.samples import Encoded, Text, crosses_the_join, encode, encode_apart
from spunge.errors import RecipeError
from spunge.evaluation.candidates import candidate_likelihoods, question_of
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.likelihood import Likelihood, likelihoods
from spunge.files import parse_json, python_literal
from spunge.model.loading import Base
from spunge.model.reading import reading_of
from spunge.progress import Steps
from spunge.recipe.evaluating import EvaluatorSettings

UNTOLD = 20  # answers, of which one would be 0 if they counted from it


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
    answers_from: Literal["auto", 0, 1] = Field(
        "auto",
        description="What answers that are numbers count from, in text or not. auto: what all rows together tell (a 0 is no label "
        "of 1 to 4, a 4 of four candidates no index).",
    )
    separator: str = Field(" ", description="Goes between prompt and candidate.")
    normalize: Literal["tokens", "characters", "none"] = Field(
        "none",
        description="What a candidate's log-likelihood is divided by. none: nothing, lm-evaluation-harness's acc. characters: its "
        "characters, the harness's acc_norm. tokens: its tokens (Brown et al. 2020, section 2.4), which is neither.",
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
    """Accuracy on multiple-choice questions, by log-likelihood."""
    asked = all_questions(items, settings)
    by_question = [[Text(each.prompt, settings.separator + text) for text in each.candidates] for each in asked]
    length = base.reach(settings.max_length)
    encoded = [coded for texts in by_question for coded in encoded_alike(texts, base.tokenizer, length)]
    texts = [text for each in by_question for text in each]
    counts = [len(each.candidates) for each in asked]
    scored = iter(zip(texts, all_likelihoods(base, encoded, counts, bench.progress), strict=True))
    right, times, chance = (np.zeros(items.num_rows) for _ in range(3))
    for each in asked:
        scores = [normalised(*next(scored), settings) for _ in each.candidates]
        # A candidate that stands twice is right in either place.
        wanted = each.candidates[each.answer]
        right[each.row] += float(each.candidates[int(np.argmax(scores))] == wanted)
        times[each.row] += 1
        chance[each.row] = each.candidates.count(wanted) / len(each.candidates)
    share = float(chance.mean()) if len(chance) else None
    return [Measure("accuracy", right / times, np.ones(len(right)), higher="known", chance=share)]


def check_items(settings: ChoicesSettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError, with the row's number, for questions that cannot be asked."""
    all_questions(items, settings)


def all_questions(items: pa.Table, settings: ChoicesSettings) -> list[Asked]:
    """Every row as the questions that are asked."""
    rows = items.to_pylist()
    first = first_label(rows, settings)
    return [each for number, row in enumerate(rows) for each in questions(row, number, settings, first)]


def answers_of(rows: Sequence[Mapping[str, Any]], settings: ChoicesSettings) -> list[int]:
    """Each row's right candidate, by its index. Raises RecipeError, with the row's number."""
    first = first_label(rows, settings)
    counted = settings.answers_from != "auto"
    return [
        answer_index(row["answer"], row["choices"], row.get(ROW, number), first, counted)
        for number, row in enumerate(rows)
    ]


def first_label(rows: Sequence[Mapping[str, Any]], settings: ChoicesSettings) -> int:
    """What answers that are numbers count from: 0, or 1 where they are labels such as '1' to '4'.

    All rows together tell: a 0 is none of the labels, a 4 of four candidates no index. Where nothing tells, a few numbers are
    indices from 0. Raises RecipeError where digits in text or many numbers do not tell, and for an answer that may as well be
    a candidate itself.
    """
    if settings.answers_from != "auto":
        return settings.answers_from
    written = [row for row in rows if _counts(row["answer"]) and not _names_one(row)]
    values = [int(_single(row["answer"])) for row in written]
    last = [
        value == len(listed(row["choices"]))
        for value, row in zip(values, written, strict=True)
        if listed(row["choices"])
    ]
    first = 1 if 0 not in values and any(last) else 0
    told = 0 in values or any(last) or not written
    if not told and (_is_digits(written[0]["answer"]) or len(written) >= UNTOLD):
        _refuse_untold(written[0], rows, "may count the candidates from 0 or from 1, and no row tells")
    for row in rows if written else ():
        if _counts(row["answer"]) and _place(row) not in (None, int(_single(row["answer"])) - first):
            _refuse_untold(row, rows, "may be a candidate itself or its number")
    return first


def _refuse_untold(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], why: str) -> NoReturn:
    number = row.get(ROW, rows.index(row))
    raise RecipeError(f"evaluate.answer: row {number}: {row['answer']!r} {why}; set evaluate.answers_from to 0 or 1")


def _counts(answer: Any) -> bool:
    """Whether an answer is a whole number, or digits in text."""
    single = _single(answer)
    number = isinstance(single, int | float) and not isinstance(single, bool) and math.isfinite(single)
    return _is_digits(answer) or (number and single == int(single))


def _place(row: Mapping[str, Any]) -> int | None:
    """Which candidate an answer is itself, if it is one."""
    options, answer = listed(row["choices"]), _single(row["answer"])
    return options.index(answer) if isinstance(options, list) and answer in options else None


def _is_digits(answer: Any) -> bool:
    single = _single(answer)
    return isinstance(single, str) and single.strip().isascii() and single.strip().isdigit()


def _single(answer: Any) -> Any:
    """The answer itself where it is the only one in a list."""
    if isinstance(answer, np.ndarray | np.generic):
        answer = answer.tolist()
    return answer[0] if isinstance(answer, list | tuple) and len(answer) == 1 else answer


def _names_one(row: Mapping[str, Any]) -> bool:
    """Whether the answer is a candidate's own text."""
    return isinstance(_single(row["answer"]), str) and _place(row) is not None


def questions(row: Mapping[str, Any], number: int, settings: ChoicesSettings, first: int = 0) -> list[Asked]:
    """A row as the questions that are asked: one, or one for each rotation of its options."""
    named = row.get(ROW, number)
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise RecipeError(f"evaluate.question: row {named} has no question; filter it out")
    options = listed(row["choices"])
    answer = answer_index(row["answer"], options, named, first, settings.answers_from != "auto")
    if settings.style == "cloze":
        return [Asked(number, settings.description + row["question"], [str(option) for option in options], answer)]
    if len(options) > len(string.ascii_uppercase):
        raise RecipeError(f"evaluate.style: row {named} has {len(options)} options, more than there are letters")
    letters = list(string.ascii_uppercase[: len(options)])
    asked = []
    for shift in range(min(settings.orders, len(options))):
        turned = options[shift:] + options[:shift]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True)]
        prompt = "\n".join([settings.description + row["question"].strip(), *lines, "Answer:"])
        asked.append(Asked(number, prompt, letters, (answer - shift) % len(options)))
    return asked


def encoded_alike(texts: Sequence[Text], tokenizer: Any, length: int) -> list[Encoded]:
    """The candidates of one question. Where a token reaches over the end of the question (a vocabulary may hold `Answer` for
    `An` + `swer`), question and candidate are tokenised apart, in all of them: each is then scored on its own letters."""
    if any(crosses_the_join(text, tokenizer) for text in texts):
        return [encode_apart(text, tokenizer, length) for text in texts]
    return [encode(text, tokenizer, length) for text in texts]


def all_likelihoods(base: Base, encoded: Sequence[Encoded], counts: Sequence[int], progress: Steps) -> list[Likelihood]:
    """Of every candidate, item after item (`counts` of each): with a shared prompt where its tokens are the same and the model
    can go on from one several times."""
    starts = [0, *itertools.accumulate(counts)]
    items = [encoded[start:stop] for start, stop in itertools.pairwise(starts)]
    shares = reading_of(base).shared
    questions = [question_of(item) if shares else None for item in items]
    shared = candidate_likelihoods(base, [question for question in questions if question], progress)
    apart = likelihoods(
        base, [text for item, question in zip(items, questions, strict=True) if not question for text in item], progress
    )
    together, alone = iter(shared), iter(apart)
    in_order: list[Likelihood] = []
    for item, question in zip(items, questions, strict=True):
        in_order += next(together) if question else [next(alone) for _ in item]
    return in_order


def normalised(text: Text, likelihood: Likelihood, settings: ChoicesSettings) -> float:
    """A candidate's log-likelihood per token, per character, or in all."""
    if settings.normalize == "none":
        return likelihood.log
    length = (
        likelihood.tokens if settings.normalize == "tokens" else len(text.completion.removeprefix(settings.separator))
    )
    return likelihood.log / max(1, length)


def listed(choices: Any) -> Any:
    """A list of candidates that came as an array, a tuple, or as the text that JSON or a data frame writes it in, as a list;
    anything else as it is."""
    if isinstance(choices, str) and choices.lstrip().startswith("["):
        for read in (parse_json, python_literal):
            with suppress(ValueError):
                return read(choices.strip())
    if isinstance(choices, np.ndarray):
        return choices.tolist()
    return list(choices) if isinstance(choices, tuple) else choices


def answer_index(answer: Any, choices: Any, row: int, first: int = 0, counted: bool = False) -> int:
    """The right candidate's index, given as a number, a letter, or the candidate itself, also as the only one in a list.

    first: what numbers count from. counted: digits are a number even where a candidate reads so. Raises RecipeError otherwise."""
    choices = listed(choices)
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecipeError(f"evaluate.choices: row {row} has no list of two candidates or more{_mend(choices)}")
    for place, candidate in enumerate(choices):
        if candidate is None or not str(candidate).strip():
            raise RecipeError(f"evaluate.choices: row {row}: candidate {place} is empty; filter the row out")
    answer = given = _single(answer)
    if isinstance(answer, str):
        if answer in choices and not (counted and _is_digits(answer)):
            return choices.index(answer)
        answer = answer.strip()
        if len(answer) == 1 and answer.upper() in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(answer.upper())
        elif _is_digits(answer):
            answer = int(answer) - first
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if number and not isinstance(given, str):
        answer -= first
    if number and answer == int(answer) and 0 <= answer < len(choices):
        return int(answer)
    raise RecipeError(
        f"evaluate.answer: row {row}: {str(given)!r} is none of its {len(choices)} candidates{_near(given, choices)}"
    )


def _near(answer: Any, choices: Sequence[Any]) -> str:
    """What to do about an answer that is no candidate."""
    texts = {str(choice).strip().lower(): str(choice) for choice in choices}
    if isinstance(answer, bool):
        return "; a truth value is a number by CAST(answer AS INTEGER)"
    if near := texts.get(str(answer).strip().lower()):
        return f"; {near!r} differs by case or spaces alone, mend the rows"
    bare = str(answer).strip("(). ")
    if len(bare) == 1 and bare.upper() in string.ascii_uppercase[: len(choices)]:
        return f"; a letter stands alone: trim(answer, '(). ') gives {bare!r}"
    return "; give its number, its letter or its text"


def _mend(choices: Any) -> str:
    """What to do about what is no list of candidates."""
    if isinstance(choices, Mapping):
        lists = [str(key) for key, value in choices.items() if isinstance(value, list)]
        wanted = f"choices.{lists[0]}" if lists else f"[{', '.join(f'choices.{key}' for key in choices)}]"
        return f", but an object; write {wanted} for the column `choices`"
    return f", but the text {choices[:40]!r}" if isinstance(choices, str) else ""


CHOICES = Evaluator(
    settings=ChoicesSettings,
    source="Brown et al. 2020, arXiv 2005.14165, section 2.4",
    measure=measure,
    columns=columns,
    metrics=lambda settings, items: {"accuracy": "known"},
    check_items=check_items,
    version=4,
)
