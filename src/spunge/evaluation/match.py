"""Match: does the model say what it must not? The plainest question of all: words, a whole answer or a pattern, row by row.

    - {kind: match, source: questions.jsonl, prompt: question, unwanted: answer}
    - {kind: match, source: questions.jsonl, prompt: question, words: [Paris, Seine], generation: {samples: 8, temperature: 1}}

Case, runs of white space, curly quotes and compatible forms of Unicode (NFKC) make no difference.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.patterns import matches
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.choices import listed
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.generation import GenerationSettings, completions, told, written_tokens
from spunge.evaluation.wording import AROUND, any_of, contains, equals, plain
from spunge.model.loading import Base
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.results import Higher

SETTING = "evaluate.match"
How = Literal["words", "contains", "equals", "pattern"]
Said = Callable[[str], bool]  # text -> whether it says what it must not


class MatchSettings(EvaluatorSettings):
    kind: str = "match"
    prompt: str = Field("prompt", description="Column or SQL expression: the prompt to answer.")
    unwanted: str | None = Field(
        None,
        description="Column or SQL expression: what the answer to this row must not say, a text or a list of them.",
    )
    words: list[str] | None = Field(None, min_length=1, description="What the answer to no row must say.")
    how: How = Field(
        "words",
        description="words: a word or phrase stands in the answer as a whole, where a script puts spaces between them. contains: "
        "it stands anywhere, in other words too. equals: it is the answer, but for punctuation around it. pattern: a regular "
        "expression is found in the answer.",
    )
    generation: GenerationSettings = Field(default=GenerationSettings(), description="How prompts are answered.")

    @model_validator(mode="after")
    def _looks_for_something(self) -> "MatchSettings":
        if self.unwanted is None and self.words is None:
            raise ValueError("unwanted: missing; name the column with what must not be said, or give words")
        for word in self.words or ():
            said_by(self.how, [word], f"{SETTING}.words")
        return self


def columns(settings: MatchSettings, forget: Mapping[str, str]) -> dict[str, str]:
    unwanted = {"unwanted": settings.unwanted} if settings.unwanted else {}
    return {"prompt": settings.prompt, **unwanted}


def measure(base: Base, settings: MatchSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Share of answers that say what they must not: words, a text, a whole answer or a pattern, of each row or of all."""
    prompts: list[str] = items["prompt"].to_pylist()
    looked_for = looked_for_in(settings, items)
    written = completions(base, prompts, settings.generation, bench)
    said = np.array([sum(map(says, texts)) for says, texts in zip(looked_for, written, strict=True)], dtype=np.float64)
    counts = np.full(len(prompts), float(settings.generation.samples))
    measures = [Measure("match", said, counts, higher="bad", worst=True)]
    if settings.generation.samples > 1:
        ones = np.ones(len(prompts))
        measures.append(Measure("match in any answer", (said > 0).astype(np.float64), ones, higher="bad"))
    return measures


def metrics(settings: MatchSettings, items: pa.Table) -> dict[str, Higher]:
    one: dict[str, Higher] = {"match": "bad"}
    return one | {"match in any answer": "bad"} if settings.generation.samples > 1 else one


def looked_for_in(settings: MatchSettings, items: pa.Table) -> list[Said]:
    """For each row, what tells whether a text says what it must not. Raises RecipeError, with the row's number."""
    if not settings.unwanted:
        return [said_by(settings.how, settings.words or [], f"{SETTING}.words")] * items.num_rows
    every = []
    for at, value in enumerate(items["unwanted"].to_pylist()):
        row = f"{SETTING}.unwanted: row {Samples(items).number(at)}"
        given = listed(value)
        texts = given if isinstance(given, list) else [given]
        if not texts:
            raise RecipeError(f"{row} has nothing that must not be said; filter it out with where")
        for text in texts:
            if not isinstance(text, str):
                raise RecipeError(
                    f"{row}: {text!r} is no text; CAST({settings.unwanted} AS VARCHAR) makes one of a number"
                )
        every.append(said_by(settings.how, [*texts, *(settings.words or ())], row))
    return every


def said_by(how: How, texts: list[str], setting: str) -> Said:
    """What tells whether a text says one of the given ones. Raises RecipeError for one that every text says, or none can."""
    for text in texts:
        if not plain(text).strip(AROUND if how == "equals" else ""):
            raise RecipeError(f"{setting}: {text!r} is empty, and nothing to look for")
    if how == "pattern":
        return matches(texts, setting)
    tells = {"words": any_of, "contains": contains, "equals": equals}
    return tells[how](texts)


def check_items(settings: MatchSettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError, with the row's number, for a row with nothing to look for or an endless pattern."""
    for says, prompt in zip(looked_for_in(settings, items), items["prompt"].to_pylist(), strict=True):
        says(str(prompt))


def instrument(settings: MatchSettings) -> dict[str, Any]:
    return {"how": settings.how, **told(settings)}


MATCH = Evaluator(
    settings=MatchSettings,
    source="plain words",
    measure=measure,
    columns=columns,
    metrics=metrics,
    instrument=instrument,
    check_items=check_items,
    written_tokens=written_tokens,
)
