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

import json
import logging
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import regex
from pydantic import Field, JsonValue, field_validator, model_validator

from spunge.data.patterns import last_group
from spunge.errors import RecipeError, one_line
from spunge.evaluation.scorers.endpoint import Endpoint, Reply, key_of
from spunge.evaluation.scorers.scorer import Answer, Loaded, Scorer
from spunge.files import append_text, cache_folder, fingerprint, parse_json, sealed, unsealed
from spunge.recipe.scoring import ScorerSettings

FIELDS = Answer._fields
THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
AROUND = string.whitespace + string.punctuation.replace("-", "").replace("+", "")
# A number alone, with no more around it than spaces, quotes, marks of emphasis, brackets and a full stop.
NUMBER = re.compile(r"[\s\"'*_`(\[]*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[\s\"'*_`)\].]*")
SHOWN = 60  # characters of a reply in an error
Share = Annotated[float, Field(ge=0, le=1)]


class JudgeSettings(ScorerSettings):
    kind: str = "judge"
    base_url: str = Field(
        pattern=r"^https?://[^\s?#]+$",
        description="Address of the endpoint, such as http://localhost:8000/v1, without credentials.",
    )
    model: str = Field(min_length=1, description="What the endpoint calls the model.")
    prompt: str = Field(
        description="What is asked of each text: {text} stands for the text, {prompt} for what it answers, {reference} for the "
        "evaluation's answer; {{ and }} for braces."
    )
    system: str | None = Field(None, description="A system message before it.")
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
    temperature: float | None = Field(0.0, ge=0, description="Of the judge's sampling; null leaves it to the endpoint.")
    request: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="More fields of the request, such as {seed: 1}; null takes one out, such as {max_tokens: null}.",
    )
    key_env: str | None = Field(
        None, description="Name of the variable of the environment that holds the key, such as OPENAI_API_KEY."
    )
    timeout: float = Field(60.0, gt=0, description="Seconds that a reply may take.")
    retries: int = Field(
        5,
        ge=0,
        description="Further tries where the endpoint is busy, slow or away, after 1, 2, 4, ... s, or as long as it asks.",
    )
    parallel: int = Field(4, ge=1, le=256, description="Requests at a time.")
    per_minute: float | None = Field(None, gt=0, description="Requests a minute, at most.")
    max_calls: int | None = Field(
        None,
        ge=1,
        description="Requests of one `spunge run`, at most, tries included; what is in the cache is not asked.",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="No request once the endpoint has counted so many tokens in one `spunge run`."
    )

    @field_validator("prompt")
    @classmethod
    def _fields_are_known(cls, prompt: str) -> str:
        names = fields_of(prompt)
        if unknown := sorted(names - set(FIELDS)):
            raise ValueError(f"no field {{{unknown[0]}}}; known: {', '.join(f'{{{name}}}' for name in FIELDS)}")
        if "text" not in names:
            raise ValueError("it never says {text}, so every text would be judged alike")
        return prompt

    @field_validator("key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError(
                "give the name of a variable in capitals, such as OPENAI_API_KEY, and never the key itself"
            )
        return name

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


def fields_of(template: str) -> set[str]:
    """The names in braces. Raises ValueError for a template that does more than name fields."""
    names = set()
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not name.isidentifier():
            raise ValueError(f"{{{name}}}: give the name of a field alone; {{{{ and }}}} stand for braces")
        names.add(name)
    return names


def body_of(settings: JudgeSettings, answer: Answer) -> dict[str, Any]:
    """The request for a text."""
    asked = settings.prompt.format_map({name: value or "" for name, value in answer._asdict().items()})
    asked = asked.encode("utf-8", "replace").decode()  # no half of a surrogate pair can be sent
    system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    body = {
        "model": settings.model,
        "messages": [*system, {"role": "user", "content": asked}],
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        **settings.request,
    }
    return {name: value for name, value in body.items() if value is not None}


def read_score(reply: Reply, settings: JudgeSettings) -> float | None:
    """The score that a reply gives, in [0, 1]; None where it is no label or number, or was cut."""
    text = THINKING.sub("", reply.text)
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
        self._settings, self._endpoint = settings, Endpoint(settings)
        # What the score depends on beside the request.
        self._reading = {name: dict(settings)[name] for name in ("base_url", "labels", "low", "high", "pattern")}
        self._file = cache_folder() / "judge" / f"{fingerprint([settings.model, self._reading])[:32]}.jsonl"
        self._known = known_scores(self._file)

    def scores(self, answers: Sequence[Answer]) -> np.ndarray:  # (n,)
        bodies = [body_of(self._settings, answer) for answer in answers]
        keys = [fingerprint([body, self._reading]) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._known}
        asked = list(missing)
        unread: dict[str, str] = {}
        for at, reply in self._endpoint.ask([missing[key] for key in asked]):
            score = read_score(reply, self._settings)
            if score is None:
                unread[asked[at]] = reply.text
            else:
                self._keep(asked[at], score)
        self._tell(unread, len(asked))
        return np.array([self._known.get(key, self._settings.unreadable) for key in keys], dtype=np.float64)

    def _keep(self, key: str, score: float) -> None:
        self._known[key] = score
        try:
            append_text(self._file, json.dumps(sealed({"asked": key, "score": score})) + "\n")
        except RecipeError:
            return  # where the cache cannot be written, nothing is kept

    def _tell(self, unread: Mapping[str, str], asked: int) -> None:
        if not unread:
            return
        first = next(iter(unread.values())).strip()
        told = f"{len(unread)} of {asked} replies of the judge are none of the labels or numbers (first: {first[:SHOWN]!r})"
        if self._settings.unreadable is None or 2 * len(unread) > asked:
            raise RecipeError(
                f"evaluate.scorer: {told}; what was read is kept: mend prompt, labels, pattern or max_tokens, and run again"
            )
        logging.getLogger("spunge").warning(
            one_line(f"evaluate.scorer: {told}; each counts {self._settings.unreadable:g}")
        )


def known_scores(file: Path) -> dict[str, float]:
    """Scores by what was asked. A line that is damaged is left out."""
    known: dict[str, float] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            content = unsealed(parse_json(line)) or {}
        except ValueError:
            continue
        key, score = content.get("asked"), content.get("score")
        if isinstance(key, str) and isinstance(score, int | float) and 0 <= score <= 1:
            known[key] = float(score)
    return known


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
    key_of(settings.key_env)
    plain = Answer("The weather was fine.", "How was the weather?", "It was fine.")
    [(_, reply)] = Endpoint(settings).ask([body_of(settings, plain)], retries=min(1, settings.retries))
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
