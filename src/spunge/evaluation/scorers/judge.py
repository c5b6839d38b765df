"""A judge: a chat model behind any OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, a vendor) that is asked for each text.

    scorer:
      kind: judge
      base_url: http://localhost:8000/v1
      model: Qwen/Qwen2.5-7B-Instruct
      prompt: "Does the answer decline the request? Say yes or no.\n\nRequest: {prompt}\n\nAnswer: {text}"
      labels: {"yes": 1, "no": 0}

A language model as a judge: Zheng et al. 2023, arXiv 2306.05685. A text that is judged may address the judge; what is between
the braces goes into the prompt as it is. Scores are kept in the cache folder by what was asked, so that nothing is asked twice.
"""

import logging
import re
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import regex
from pydantic import Field, field_validator, model_validator

from spunge.data.patterns import last_group
from spunge.endpoints.answers import Answers
from spunge.endpoints.client import Endpoint, Reply, key_of
from spunge.endpoints.settings import EndpointSettings, fields_of, request_of
from spunge.errors import RecipeError, one_line
from spunge.evaluation.scorers.scorer import Answer, Loaded, Scorer
from spunge.files import cache_folder, fingerprint
from spunge.recipe.scoring import ScorerSettings

SETTING = "evaluate.scorer"
FIELDS = Answer._fields
AROUND = string.whitespace + string.punctuation.replace("-", "").replace("+", "")
# A number alone, with no more around it than spaces, quotes, marks of emphasis, brackets and a full stop.
NUMBER = re.compile(r"[\s\"'*_`(\[]*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[\s\"'*_`)\].]*")
SHOWN = 60  # characters of a reply in an error
Share = Annotated[float, Field(ge=0, le=1)]


class JudgeSettings(EndpointSettings, ScorerSettings):
    kind: str = "judge"
    prompt: str = Field(
        description="What is asked of each text: {text} stands for the text, {prompt} for what it answers, {reference} for the "
        "evaluation's answer; {{ and }} for braces."
    )
    labels: dict[str, Share] | None = Field(
        None,
        min_length=1,
        description="Replies and their scores, such as {'yes': 1, 'no': 0}. Default: the reply is a number.",
    )
    low: float = Field(0.0, description="A number that means a score of 0, where replies are numbers.")
    high: float = Field(1.0, description="A number that means a score of 1.")
    pattern: str | None = Field(
        None,
        description="Regular expression whose one group is the label or number, the last time it matches, such as "
        r"'Rating: *(\d+)'. Default: the reply is nothing else.",
    )
    unreadable: Share | None = Field(
        None, description="Score of a text whose reply is no label or number. Default: the run stops there."
    )
    max_tokens: int = Field(16, ge=1, description="Tokens of a reply. A judge that reasons first needs hundreds.")

    @field_validator("prompt")
    @classmethod
    def _fields_are_known(cls, prompt: str) -> str:
        names = fields_of(prompt)
        if unknown := sorted(names - set(FIELDS)):
            raise ValueError(f"no field {{{unknown[0]}}}; known: {', '.join(f'{{{name}}}' for name in FIELDS)}")
        if "text" not in names:
            raise ValueError("it never says {text}, so every text would be judged alike")
        return prompt

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and regex.compile(pattern).groups != 1:
                raise ValueError("put the label or number into one group, (...)")
        except regex.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _scores_differ(self) -> "JudgeSettings":
        if self.low == self.high:
            raise ValueError("low, high: two numbers that differ")
        if self.labels is not None and (self.low, self.high) != (0.0, 1.0):
            raise ValueError("low, high: labels have scores of their own; leave them out")
        spelled = [bare(label) for label in self.labels or ()]
        if "" in spelled or len(set(spelled)) < len(spelled):
            raise ValueError("labels: each must be told from the others by its letters, whatever their case")
        return self


def body_of(settings: JudgeSettings, answer: Answer) -> dict[str, Any]:
    """The request for a text."""
    return request_of(settings, **{name: value or "" for name, value in answer._asdict().items()})


def read_score(reply: Reply, settings: JudgeSettings) -> float | None:
    """The score that a reply gives, in [0, 1]; None where it is no label or number, or was cut."""
    text = reply.said
    if reply.cut:
        return None
    if settings.pattern is not None:
        text = last_group(settings.pattern, text, "evaluate.scorer.pattern")
    if settings.labels is not None:
        return {bare(label): score for label, score in settings.labels.items()}.get(bare(text))
    number = NUMBER.fullmatch(text)
    if number is None:
        return None
    share = (float(number[1]) - settings.low) / (settings.high - settings.low)
    return share if 0 <= share <= 1 else None


def bare(text: str) -> str:
    """A reply without case, and without spaces, quotes and other marks around it."""
    return " ".join(text.strip(AROUND).casefold().split())


class Judge:
    """A judge at work: what was asked before is known, what is asked now is kept as it comes."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings, self._endpoint = settings, Endpoint(settings, SETTING)
        # What the score depends on beside the request.
        self._reading = {name: dict(settings)[name] for name in ("base_url", "labels", "low", "high", "pattern")}
        file = cache_folder() / "judge" / f"{fingerprint([settings.model, self._reading])[:32]}.jsonl"
        self._answers = Answers(file, "score", _score)

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:  # (n,)
        bodies = [body_of(self._settings, answer) for answer in answers]
        keys = [fingerprint([body, self._reading]) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._answers.known}
        asked = list(missing)
        unread: dict[str, str] = {}
        for at, reply in self._endpoint.ask([missing[key] for key in asked]):
            score = read_score(reply, self._settings)
            if score is None:
                unread[asked[at]] = reply.text
            else:
                self._answers.keep(asked[at], score)
        self._tell(unread, len(asked))
        return np.array([self._answers.known.get(key, self._settings.unreadable) for key in keys], dtype=np.float64)

    def _tell(self, unread: Mapping[str, str], asked: int) -> None:
        if not unread:
            return
        first = next(iter(unread.values())).strip()
        told = f"{len(unread)} of {asked} replies of the judge are none of the labels or numbers (first: {first[:SHOWN]!r})"
        if self._settings.unreadable is None or 2 * len(unread) > asked:
            raise RecipeError(
                f"evaluate.scorer: {told}; {'what was read is kept: ' if len(unread) < asked else ''}mend prompt, labels, pattern "
                "or max_tokens, and run again"
            )
        logging.getLogger("spunge").warning(
            one_line(f"evaluate.scorer: {told}; each counts {self._settings.unreadable:g}")
        )


def _score(kept: object) -> float | None:
    return float(kept) if isinstance(kept, int | float) and 0 <= kept <= 1 else None


def load(settings: JudgeSettings) -> Loaded:
    """A chat model behind an OpenAI-compatible endpoint, asked for a number or a label of each text."""
    judge = Judge(settings)
    return Loaded(lambda texts: judge.scores([Answer(text) for text in texts]), score_answers=judge.scores)


def instrument(settings: JudgeSettings) -> dict[str, Any]:
    """The model, where it is, what it is asked and how its reply is read."""
    names = ("base_url", "model", "prompt", "system", "max_tokens", "temperature", "request", "labels", "low", "high")
    content = settings.model_dump(mode="json", include={*names, "pattern", "unreadable"})
    return {"scorer": "judge", **{name: value for name, value in content.items() if value not in (None, {})}}


def check(settings: JudgeSettings, fields: frozenset[str]) -> None:
    """Ask once, of a plain text: an endpoint that is down, slow or of another kind is told before anything is trained."""
    if unknown := sorted(fields_of(settings.prompt) - {"text"} - fields):
        raise RecipeError(
            f"evaluate.scorer.prompt: this evaluation knows no {{{unknown[0]}}}; known: "
            f"{', '.join(f'{{{name}}}' for name in ('text', *sorted(fields)))}"
        )
    key_of(settings.key_env, SETTING)
    plain = Answer("The weather was fine.", "How was the weather?", "It was fine.")
    [(_, reply)] = Endpoint(settings, SETTING).ask([body_of(settings, plain)], retries=min(1, settings.retries))
    if read_score(reply, settings) is None and settings.unreadable is None:
        why = "was cut at max_tokens" if reply.cut else "is none of the labels or numbers"
        raise RecipeError(
            f"evaluate.scorer: the judge's reply to a plain text {why}: {reply.text.strip()[:SHOWN]!r}; mend prompt, labels, "
            "pattern or max_tokens"
        )


JUDGE = Scorer(
    settings=JudgeSettings,
    source="Zheng et al. 2023, arXiv 2306.05685",
    load=load,
    instrument=instrument,
    check=check,
)
