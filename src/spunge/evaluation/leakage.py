"""Leakage: is the forgotten answer among k sampled ones? Greedy decoding shows one answer of many that a model gives.

leak@k is the chance that at least one of k answers leaks, estimated without bias from n >= k sampled ones of which c leak:
1 - C(n - c, k) / C(n, k), averaged over the questions. (leak@k: Reisizadeh et al. 2025, arXiv 2511.04934; the estimator: Chen et
al. 2021, arXiv 2107.03374, eq. 1.)

    - {kind: leakage, source: questions.jsonl, prompt: question, answer: answer}                 # ROUGE-L recall
    - {kind: leakage, source: questions.jsonl, leaks: contains, k: [1, 4], generation: {samples: 8, temperature: 1.0}}
    - {kind: leakage, source: questions.jsonl, answer: answer, leaks: scorer, scorer: {kind: judge, ..}}
"""

from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.query import ROW
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.generation import GenerationSettings, completions, told, written_tokens
from spunge.evaluation.rouge import Words, refuse_unreadable, rouge_l
from spunge.evaluation.scorers.scorer import chosen_scorer, keep_scored, score_completions
from spunge.evaluation.toxicity import is_empty
from spunge.evaluation.wording import any_of
from spunge.model.loading import Base
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.scoring import SCORING, Scoring

Answers = Annotated[int, Field(ge=1)]


class LeakageSettings(EvaluatorSettings):
    kind: str = "leakage"
    prompt: str = Field("prompt", description="Column or SQL expression: the question.")
    answer: str | None = Field(
        None,
        description="Column or SQL expression: the answer that is not to be given, or a list of its forms. Default: `answer`; none "
        "where a scorer decides.",
    )
    leaks: Literal["rouge", "contains", "scorer"] = Field(
        "rouge",
        description="What makes a sampled answer a leak. rouge: its ROUGE-L recall of the answer reaches the threshold. contains: "
        "the answer stands in it, whole, whatever the case. scorer: its score reaches the threshold.",
    )
    threshold: float = Field(0.5, gt=0, le=1, description="Of the recall, or of the score.")
    words: Words = Field(
        "ascii", description="What ROUGE takes for words: a-z and 0-9 alone, or letters of any script."
    )
    scorer: Scoring | None = Field(None, description=f"Who says that an answer leaks: {SCORING}")
    k: list[Answers] = Field(
        [1, 4, 16], min_length=1, description="Numbers of answers, each a metric: leak@1 and so on."
    )
    generation: GenerationSettings = Field(
        default=GenerationSettings(samples=16, temperature=1.0), description="How answers are sampled."
    )

    @model_validator(mode="after")
    def _can_be_told(self) -> "LeakageSettings":
        if max(self.k) > self.generation.samples:
            raise ValueError(
                f"k: {max(self.k)} answers of {self.generation.samples} that are sampled; raise generation.samples"
            )
        if (self.leaks == "scorer") != (self.scorer is not None):
            raise ValueError("scorer: leaks: scorer and a scorer go together; give both or neither")
        return self


def columns(settings: LeakageSettings, forget: Mapping[str, str]) -> dict[str, str]:
    answer = settings.answer or (None if settings.leaks == "scorer" else "answer")
    return {"prompt": settings.prompt, **({} if answer is None else {"reference": answer})}


def instrument(settings: LeakageSettings) -> dict[str, Any]:
    """Who tells a leak, and how answers are sampled."""
    scorer = {} if settings.scorer is None else chosen_scorer(settings.scorer).instrument()
    return {"leaks": settings.leaks, **scorer, "threshold": settings.threshold, **told(settings)}


def check_items(settings: LeakageSettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError for an answer that cannot be looked for, and where the scorer cannot be had."""
    if settings.scorer is not None:
        chosen_scorer(settings.scorer).check("prompt", *(["reference"] if "reference" in items.column_names else []))
    if "reference" not in items.column_names:
        return
    numbers = items[ROW].to_pylist() if ROW in items.column_names else list(range(items.num_rows))
    for number, forms in zip(numbers, references(items), strict=True):
        if not forms or not all(any(letter.isalnum() for letter in form) for form in forms):
            raise RecipeError(f"evaluate.answer: row {number} has an answer without a letter; filter it out with where")
        if settings.leaks == "rouge":
            refuse_unreadable(forms, [number] * len(forms), settings.words, "evaluate.answer")


def measure(base: Base, settings: LeakageSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """Chance that at least one of k sampled answers gives the forgotten one."""
    prompts: list[str] = items["prompt"].to_pylist()
    scorer = None if settings.scorer is None else chosen_scorer(settings.scorer).loaded(bench, prompts)
    written = completions(base, prompts, settings.generation, bench)
    if scorer is None:
        recall = recall_of(settings)
        scores = np.array(
            [[recall(forms, text) for text in texts] for forms, texts in zip(references(items), written, strict=True)]
        )
    else:
        forms = references(items) if "reference" in items.column_names else [None] * len(prompts)
        known = [
            {"prompt": prompt} | ({} if each is None else {"reference": " / ".join(each)})
            for prompt, each in zip(prompts, forms, strict=True)
        ]
        scores = score_completions(written, known, scorer, settings.threshold, bench)
    keep_scored(settings, written, scores, bench)
    count = settings.generation.samples
    leaking = (scores >= settings.threshold).sum(axis=1).tolist()
    ones = np.ones(len(prompts))
    shares = {f"leak@{k}": np.array([leak_at(k, count, each) for each in leaking]) for k in sorted(set(settings.k))}
    measures = [Measure(name, share, ones, higher="known", worst=True) for name, share in shares.items()]
    empty = np.array([float(sum(map(is_empty, texts))) for texts in written])
    return [*measures, Measure("empty", empty, ones * count, higher="bad", side=True)]


def leak_at(k: int, count: int, leaking: int) -> float:
    """Chance that k of `count` answers, `leaking` of which leak, drawn without replacement, hold a leak: without bias the chance
    for k new answers."""
    return 1 - comb(count - leaking, k) / comb(count, k)


def references(items: pa.Table) -> list[list[str]]:
    """The forms of each item's answer."""
    return [each if isinstance(each, list) else [each] for each in items["reference"].to_pylist()]


def recall_of(settings: LeakageSettings) -> Callable[[Sequence[str], str], float]:
    """(forms of the answer, text) -> how much of one of them the text gives, in [0, 1]."""
    if settings.leaks == "contains":
        return lambda forms, text: float(any_of(forms)(text))
    overlap = rouge_l(settings.words, settings.words == "ascii", "evaluate.leaks")
    return lambda forms, text: max(overlap(form, text).recall for form in forms)


LEAKAGE = Evaluator(
    settings=LeakageSettings,
    source="Reisizadeh et al. 2025, arXiv 2511.04934; Chen et al. 2021, arXiv 2107.03374",
    measure=measure,
    columns=columns,
    metrics=lambda settings, items: {**{f"leak@{k}": "known" for k in settings.k}, "empty": "bad"},
    instrument=instrument,
    check_items=check_items,
    written_tokens=written_tokens,
)
