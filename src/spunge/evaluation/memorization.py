"""Memorisation: how much of an answer, or of a text, the model still holds, by the measures of TOFU, MUSE and their kin.

- `rouge`: ROUGE-L recall and F1 of the written answer (TOFU, arXiv 2401.06121).
- `probability`: P(answer | prompt)^(1/n) over its n tokens (TOFU).
- `options`: that probability over the sum of it and of the perturbed answers' (TOFU: real authors and world facts).
- `truth_ratio`: R of TOFU's equation 1 (see `truth`), and what is made of it: min(R, 1/R) for what is to be forgotten,
  max(0, 1 - R) for what is to be kept.
- `exact`: the share of tokens that are the likeliest ones after all tokens before them (Tirumala et al. 2022, arXiv 2205.10770).
- `extraction`: 1 - k/n, with the least k such that the answer's first k tokens are followed by all others, greedily
  (Wang et al. 2025, arXiv 2406.09179).
- `verbatim`: ROUGE-L F1 of what the model writes after a text's first tokens (MUSE, arXiv 2407.06460: VerbMem).

What ends an answer, the end token or the end of a turn, is none of its tokens in any of these (`score_end` for one exception).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from spunge.data.samples import IGNORED, PROMPT_SHARE, Encoded, Samples, encode
from spunge.errors import RecipeError
from spunge.evaluation.columns import sample_columns
from spunge.evaluation.evaluator import Bench, Evaluator, Limits, Measure
from spunge.evaluation.generation import GenerationSettings, completions, told
from spunge.evaluation.likelihood import likelihoods, token_values
from spunge.evaluation.reproduction import exact_memorization, extraction_strength, likeliest
from spunge.evaluation.rouge import Words, refuse_unreadable, rouge_l
from spunge.evaluation.truth import alternatives, among_options, log_truth_ratio, perturbed_answers, truth_measures
from spunge.model.loading import Base
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.results import Higher

SETTING = "evaluate.memorization"
PERTURBED = f"{SETTING}.perturbed"
WHOLE = 1 << 30  # tokens: no limit
Metric = Literal["rouge", "probability", "options", "truth_ratio", "exact", "extraction", "verbatim"]
OF_ANSWERS = ("rouge", "options", "truth_ratio")  # metrics that plain texts have none of
OF_ALTERNATIVES = ("options", "truth_ratio")  # that need perturbed answers
WRITTEN = ("rouge", "verbatim")  # for which the model writes

NAMED: dict[Metric, dict[str, Higher]] = {
    "rouge": {"ROUGE-L recall": "known", "ROUGE-L F1": "known"},
    "probability": {"answer probability": "known"},
    "options": {"probability among options": "known"},
    "truth_ratio": {
        "truth ratio": "unknown",
        "truth ratio, nearness to 1": "unknown",
        "truth ratio, true over false": "known",
    },
    "exact": {"exact memorization": "known"},
    "extraction": {"extraction strength": "known"},
    "verbatim": {"verbatim ROUGE-L F1": "known"},
}


class MemorizationSettings(EvaluatorSettings):
    kind: str = "memorization"
    text: str | None = Field(None, description="Column or SQL expression with plain text. Default: forget's columns.")
    prompt: str | None = Field(
        None,
        description="Column or SQL expression with the question; goes with completion, and is put as forget's are.",
    )
    completion: str | None = Field(None, description="Column or SQL expression: the answer.")
    messages: str | None = Field(None, description="Column with conversations; their last answer is measured.")
    paraphrased: str | None = Field(
        None, description="Column or SQL expression: the answer in other words, for truth_ratio. Default: the answer."
    )
    perturbed: str | None = Field(
        None,
        description="Column or SQL expression: a wrong answer or a list of them, for truth_ratio and options. They follow the "
        "prompt as the answer does, with the white space that it begins with; so does `paraphrased`.",
    )
    metrics: list[Metric] | None = Field(
        None,
        description="What is measured. Default: rouge, probability, exact, extraction, and truth_ratio where there are perturbed "
        "answers; of plain texts exact, extraction and verbatim.",
    )
    perturbed_mean: Literal["arithmetic", "geometric"] = Field(
        "arithmetic",
        description="Mean over perturbed answers in the truth ratio: arithmetic is TOFU's equation 1, geometric what TOFU's script "
        "for its leaderboard and open-unlearning compute.",
    )
    score_end: bool = Field(
        False,
        description="Count what ends an answer (forget.answer_end) among its tokens in probability, options and truth_ratio, as "
        "the code of TOFU does. Never in the others.",
    )
    prefix: int = Field(32, ge=1, description="Tokens of a text, or of an answer, that verbatim gives to the model.")
    words: Words = Field(
        "ascii",
        description="What ROUGE takes for words: ascii as the package rouge-score does, a-z and 0-9 alone (stemmed in rouge as in "
        "TOFU, not in verbatim as in MUSE); unicode: those of any script, not stemmed.",
    )
    generation: GenerationSettings = Field(
        default=GenerationSettings(max_new_tokens=128), description="How answers and continuations are written."
    )
    max_length: int = Field(1024, ge=2, description="Tokens of prompt and answer, or of a text; longer ones are cut.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "MemorizationSettings":
        if self.generation.chat:
            raise ValueError("generation.chat: questions are put as forget's rows are; set forget.chat instead")
        if self.metrics is not None and not self.metrics:
            raise ValueError("metrics: an empty list; leave it out, or name one")
        asked = [metric for metric in self.metrics or () if metric in OF_ALTERNATIVES]
        if asked and self.perturbed is None:
            raise ValueError(f"perturbed: missing, and {asked[0]} needs wrong answers to compare with")
        return self


def columns(settings: MemorizationSettings, forget: Mapping[str, str]) -> dict[str, str]:
    alternatives = {"paraphrased": settings.paraphrased, "perturbed": settings.perturbed}
    return sample_columns(settings, forget, SETTING) | {role: given for role, given in alternatives.items() if given}


def metrics_of(settings: MemorizationSettings, items: pa.Table) -> list[Metric]:
    """What is measured on these items. Raises RecipeError for a metric of answers where there are plain texts alone."""
    plain = "text" in items.column_names
    if settings.metrics is None:
        ratio: list[Metric] = ["truth_ratio"] if "perturbed" in items.column_names else []
        return ["exact", "extraction", "verbatim"] if plain else ["rouge", "probability", *ratio, "exact", "extraction"]
    for metric in settings.metrics:
        if plain and metric in OF_ANSWERS:
            raise RecipeError(
                f"{SETTING}.metrics: {metric} needs answers, and these are plain texts; give prompt and completion"
            )
    return list(dict.fromkeys(settings.metrics))


def metrics(settings: MemorizationSettings, items: pa.Table) -> dict[str, Higher]:
    return {name: higher for metric in metrics_of(settings, items) for name, higher in NAMED[metric].items()}


def measure(base: Base, settings: MemorizationSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """ROUGE-L, probability, truth ratio, exact memorisation and extraction strength of answers; verbatim continuations of texts."""
    chosen, rows = metrics_of(settings, items), answer_rows(items)
    measures: list[Measure] = []
    if "rouge" in chosen:
        measures += _rouge(base, settings, rows, bench)
    if {"probability", *OF_ALTERNATIVES} & set(chosen):
        measures += _probabilities(base, settings, items, chosen, bench)
    if {"exact", "extraction"} & set(chosen):
        measures += _reproduced(base, settings, rows, chosen, bench)
    if "verbatim" in chosen:
        measures += _verbatim(base, settings, rows, bench)
    return measures


def answer_rows(items: pa.Table) -> Samples:
    """The items' prompts and answers, without what ends an answer."""
    return _sample_rows(items).answers_alone()


def _sample_rows(items: pa.Table) -> Samples:
    return Samples(items.drop_columns([role for role in ("paraphrased", "perturbed") if role in items.column_names]))


def encoded(rows: Samples, tokenizer: Any, length: int) -> list[Encoded]:
    texts = rows.texts(range(len(rows)), tokenizer, SETTING)
    return [encode(text, tokenizer, length, PROMPT_SHARE) for text in texts]


def _rouge(base: Base, settings: MemorizationSettings, rows: Samples, bench: Bench) -> list[Measure]:
    """ROUGE-L recall and F1 of what the model writes after each prompt."""
    # The prompt's tokens as they are before the answer: one that ends in a space would be other tokens alone.
    prompts = [text.ids[: _start(text)] for text in encoded(rows, base.tokenizer, WHOLE)]
    overlap = rouge_l(settings.words, stemmed=True, setting=SETTING)
    written = completions(base, prompts, settings.generation, bench)
    scores = [
        [overlap(reference, answer.strip()) for answer in answers]
        for reference, answers in zip(references(rows), written, strict=True)
    ]
    counts = np.full(len(rows), float(settings.generation.samples))
    sums = np.array([np.sum(each, axis=0) for each in scores]).reshape(-1, 2)
    named = zip(("ROUGE-L recall", "ROUGE-L F1"), sums.T, strict=True)
    return [Measure(name, values, counts, higher="known") for name, values in named]


def references(rows: Samples) -> list[str]:
    """The answers as texts."""
    return [str(answer if isinstance(answer, str) else answer["content"]).strip() for answer in rows.answers()]


def _start(text: Encoded) -> int:
    """Where the scored tokens begin."""
    return next((at for at, label in enumerate(text.labels) if label != IGNORED), len(text.ids))


def _probabilities(
    base: Base, settings: MemorizationSettings, items: pa.Table, chosen: Sequence[Metric], bench: Bench
) -> list[Measure]:
    """Probability per token of the answer, alone and beside those of other answers."""
    rows = _sample_rows(items) if settings.score_end else answer_rows(items)
    compared = set(OF_ALTERNATIVES) & set(chosen)
    wrong = perturbed_answers(items, PERTURBED) if compared else []
    same = items["paraphrased"].to_pylist() if "truth_ratio" in chosen and settings.paraphrased else []
    answers = {"own": None, "same": [[text] for text in same], "wrong": wrong}
    logs = {
        name: _mean_logs(base, settings, rows, texts, bench)
        for name, texts in answers.items()
        if texts is None or texts
    }
    own = np.concatenate(logs["own"])
    ones, measures = np.ones(len(rows)), []
    if "probability" in chosen:
        measures.append(Measure("answer probability", np.exp(own), ones, higher="known"))
    if "options" in chosen:
        shares = [among_options(answer, others) for answer, others in zip(own, logs["wrong"], strict=True)]
        measures.append(Measure("probability among options", np.array(shares), ones, higher="known"))
    if "truth_ratio" in chosen:
        true = np.concatenate(logs["same"]) if same else own
        ratios = [
            log_truth_ratio(answer, others, settings.perturbed_mean)
            for answer, others in zip(true, logs["wrong"], strict=True)
        ]
        measures += truth_measures(np.array(ratios))
    return measures


def _mean_logs(
    base: Base, settings: MemorizationSettings, rows: Samples, others: Sequence[Sequence[str]] | None, bench: Bench
) -> list[np.ndarray]:
    """For each row, log P^(1/n) of its own answer, or of each of others that take its place."""
    asked = rows if others is None else alternatives(rows, others)
    coded = encoded(asked, base.tokenizer, base.reach(settings.max_length))
    means = np.array([each.log / max(1, each.tokens) for each in likelihoods(base, coded, bench.progress)])
    counts = [1 if others is None else len(others[at]) for at in range(len(rows))]
    return np.split(means, np.cumsum(counts)[:-1])


def _reproduced(
    base: Base, settings: MemorizationSettings, rows: Samples, chosen: Sequence[Metric], bench: Bench
) -> list[Measure]:
    """Exact memorisation and extraction strength, from the likeliest token at each place of the answer."""
    coded = encoded(rows, base.tokenizer, base.reach(settings.max_length))
    hits = token_values(base, coded, likeliest, bench.progress)
    named = {
        "exact": ("exact memorization", exact_memorization),
        "extraction": ("extraction strength", extraction_strength),
    }
    ones = np.ones(len(rows))
    return [
        Measure(name, np.array([of(each.numpy() == 1) for each in hits]), ones, higher="known")
        for metric, (name, of) in named.items()
        if metric in chosen
    ]


def _verbatim(base: Base, settings: MemorizationSettings, rows: Samples, bench: Bench) -> list[Measure]:
    """ROUGE-L F1 of the continuation of the first tokens of each text or answer."""
    coded = encoded(rows, base.tokenizer, base.reach(settings.max_length))
    starts = [_start(text) + settings.prefix for text in coded]
    most = settings.generation.max_new_tokens
    rests = [
        [token for token in text.labels[start:] if token != IGNORED][:most]
        for text, start in zip(coded, starts, strict=True)
    ]
    truths = [base.tokenizer.decode(rest, skip_special_tokens=True) for rest in rests]
    prompts = [text.ids[:start] for text, start in zip(coded, starts, strict=True)]
    overlap = rouge_l(settings.words, stemmed=False, setting=SETTING)
    written = completions(base, prompts, settings.generation, bench)
    sums = [sum(overlap(truth, text).f1 for text in texts) for truth, texts in zip(truths, written, strict=True)]
    counts = np.full(len(rows), float(settings.generation.samples))
    return [Measure("verbatim ROUGE-L F1", np.array(sums), counts, higher="known")]


def check_items(settings: MemorizationSettings, items: pa.Table, limits: Limits) -> None:
    """Raises RecipeError, with the row's number, for what cannot be measured: no token, no wrong answer, no word, too short."""
    chosen, rows = metrics_of(settings, items), answer_rows(items)
    numbers = [rows.number(at) for at in range(len(rows))]
    length = min(settings.max_length, limits.positions or settings.max_length)
    coded = encoded(rows, limits.tokenizer, length)
    for text, number in zip(coded, numbers, strict=True):
        tokens = sum(label != IGNORED for label in text.labels[1:])
        if not tokens:
            raise RecipeError(
                f"{SETTING}: row {number} has no token to score after a first one; filter it out with where"
            )
        if "verbatim" in chosen and tokens <= settings.prefix:
            raise RecipeError(
                f"{SETTING}.prefix: row {number} has {tokens} tokens, none of them after the first {settings.prefix}; give a "
                "smaller prefix, or filter it out with where"
            )
    if "rouge" in chosen:
        refuse_unreadable(references(rows), numbers, settings.words, SETTING)
    if "verbatim" in chosen:
        rests = [
            [token for token in text.labels[_start(text) + settings.prefix :] if token != IGNORED] for text in coded
        ]
        decoded = [limits.tokenizer.decode(rest, skip_special_tokens=True) for rest in rests]
        refuse_unreadable(decoded, numbers, settings.words, SETTING)
    if set(OF_ALTERNATIVES) & set(chosen):
        _refuse_wordless(perturbed_answers(items, PERTURBED), rows, numbers, limits, length)


def _refuse_wordless(
    others: Sequence[Sequence[str]], rows: Samples, numbers: Sequence[int], limits: Limits, length: int
) -> None:
    owners = [number for number, texts in zip(numbers, others, strict=True) for _ in texts]
    for text, number in zip(encoded(alternatives(rows, others), limits.tokenizer, length), owners, strict=True):
        if all(label == IGNORED for label in text.labels[1:]):
            raise RecipeError(f"{PERTURBED}: row {number} has an answer without a token; mend the row")


def written_tokens(settings: MemorizationSettings) -> int:
    """Tokens that the model writes for each item, at the most."""
    times = 1 if settings.metrics is None else len(set(WRITTEN) & set(settings.metrics))
    return times * settings.generation.samples * settings.generation.max_new_tokens


def instrument(settings: MemorizationSettings) -> dict[str, Any]:
    """How answers are written. Whether a template holds the questions is in the items: they are put as forget's rows are."""
    generation = {key: value for key, value in told(settings)["generation"].items() if key != "chat"}
    return {"generation": generation}


MEMORIZATION = Evaluator(
    settings=MemorizationSettings,
    source="Maini et al. 2024, arXiv 2401.06121",
    measure=measure,
    columns=columns,
    metrics=metrics,
    instrument=instrument,
    check_items=check_items,
    written_tokens=written_tokens,
)
