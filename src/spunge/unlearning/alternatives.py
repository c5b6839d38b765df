"""Other plausible answers that the base itself writes to forget prompts, as AltPO's authors have them written.

The model is asked in their words for "another version of the answer with some alternate plausible facts", and its text is
drawn from its own distribution at a temperature (github.com/molereddy/Alternate-Preference-Optimization: generate.py, prompts.py).
The noise of a draw is that of the asked tokens, the seed and the draw's number: a row has the same answers in its branch, in the
joint control, and after an interruption.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from spunge.data.chat import Conversation
from spunge.data.samples import Samples
from spunge.data.template import Template
from spunge.errors import RecipeError
from spunge.files import append_text, fingerprint, write_text
from spunge.recipe.block import Strict
from spunge.unlearning.drawing import drawn
from spunge.unlearning.method import Task
from spunge.unlearning.refusals import prompted

ENDS = ("Question:", "Q:")  # what follows is no part of an answer
TRIES = 10  # draws for one answer, where one is empty or the answer to forget
Draw = Callable[[list[int], int], str]  # the asked tokens, the draw's number -> what the base writes


class Alternatives(Strict):
    """How the base writes other answers, where the forget rows have no column of them."""

    count: int = Field(
        5,
        ge=1,
        description="Other answers to each prompt. Each pass over the samples takes the next one; no more are written than "
        "there are passes.",
    )
    temperature: float = Field(1.0, ge=0, description="Of the draws; 0 writes the likeliest token each time.")
    seed: int = Field(0, ge=0, description="Of the draws.")
    tokens: int = Field(200, ge=1, description="Most tokens of an answer.")
    ask: str = Field(
        "Question: {question}\nAnswer: {answer}\n"
        "Now write another version of the answer with some alternate plausible facts that change answer details.\n",
        description="What the base is asked, through its chat template where it has one; {question} and {answer} are filled in.",
    )
    begin: str = Field("Alternate Answer :", description="What its text begins with.")

    @model_validator(mode="after")
    def _answers_that_can_differ(self) -> "Alternatives":
        if self.temperature == 0 and self.count > 1:
            raise ValueError("temperature: at 0 all answers to a prompt are the same; set it above 0, or count to 1")
        if missing := next((each for each in ("{question}", "{answer}") if each not in self.ask), None):
            raise ValueError(f"ask: {missing} is missing, and what is asked is not about the row; put it in")
        return self


def alternatives(
    task: Task, samples: Samples, settings: Alternatives, count: int, method: str, rows: Sequence[int]
) -> list[list[str]]:
    """`count` other answers of the base to each of some rows of the samples: a list for each answer's number, in the rows' order.

    What is written is kept beside the task's state by what it is made of. Raises RecipeError, which names the row, where the base
    writes nothing, or nothing but the answer to forget.
    """
    where = f"{task.setting}.alternatives"
    known = Known(task.state)
    every_pair = questions(samples, method, task.base.tokenizer)
    pairs = [every_pair[row] for row in rows]
    asked = [asking(task.base.tokenizer, settings, *pair, where) for pair in pairs]
    if (room := task.base.reach(1 << 40) - settings.tokens) < (longest := max(map(len, asked))):
        raise RecipeError(
            f"{where}.tokens: {settings.tokens}: the longest request has {longest} tokens, and the model no positions for so many "
            f"after it; set it to {room + settings.tokens - longest} or lower, or leave long rows out"
        )

    def draw(ids: list[int], number: int) -> str:
        key = fingerprint([ids, number, settings.temperature, settings.seed, settings.tokens])
        if key not in known.texts:
            known.keep(key, written(task, settings, ids, number))
        return known.texts[key]

    every: list[list[str]] = [[] for _ in range(count)]
    for done, (row, ids, (_, answer)) in enumerate(zip(rows, asked, pairs, strict=True), 1):
        for number in range(count):
            every[number].append(_other(draw, ids, number, answer, f"{where}: row {samples.number(row)}", settings))
        task.progress(0, 1, f"other answers of the base, {done} of {len(asked)}")
    return every


def _other(draw: Draw, ids: list[int], number: int, answer: str, where: str, settings: Alternatives) -> str:
    """The first of a number's draws that is another answer."""
    tries = TRIES if settings.temperature else 1
    texts = (draw(ids, settings.count * each + number) for each in range(tries))
    other = next((text for text in texts if text and text != answer), None)
    if other is None:
        raise RecipeError(
            f"{where}: in {tries} draws the base wrote no other answer than {answer!r}, or nothing; give a column of other answers "
            "(forget.refusal), or another ask or temperature"
        )
    return other


class Known:
    """What was written so far, by what it is made of; in a file where the task has a state."""

    def __init__(self, state: Path | None) -> None:
        self._file = state.with_name(f"{state.stem}-alternatives.jsonl") if state else None
        lines = self._file.read_text("utf-8").splitlines(True) if self._file and self._file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # an interruption may leave half a line
        if self._file and len(whole) < len(lines):
            write_text(self._file, "".join(whole))
        self.texts: dict[str, str] = dict(json.loads(line) for line in whole)

    def keep(self, key: str, text: str) -> None:
        self.texts[key] = text
        if self._file:
            append_text(self._file, json.dumps([key, text]) + "\n")


def questions(samples: Samples, method: str, tokenizer: Any) -> list[tuple[str, str]]:
    """Each sample's question and answer: prompt and completion, or the last user message before the last learned one, and that.
    Raises RecipeError for plain texts, and for a conversation without a question in words."""
    if samples.plain or "prompt" in samples.table.column_names:
        return [(text.prompt.strip(), text.completion.strip()) for text in prompted(samples, method, tokenizer)]
    pairs = []
    for row, line in enumerate(samples.table["conversation"].to_pylist()):
        conversation = Conversation.from_json(line)
        before = conversation.messages[: conversation.learned[-1]]
        question = next((each.get("content") for each in reversed(before) if each["role"] == "user"), None)
        answer = conversation.answer.get("content")
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise RecipeError(
                f"forget: row {samples.number(row)}: {method} asks for another answer to a question, and it has no user's and "
                "assistant's message in words; filter the row out, or give forget.refusal"
            )
        pairs.append((question.strip(), answer.strip()))
    return pairs


def asking(tokenizer: Any, settings: Alternatives, question: str, answer: str, where: str) -> list[int]:
    """The tokens of what the base is asked, with the beginning of what it writes."""
    before, _, after = settings.ask.partition("{question}")  # a question may have braces of its own
    text = before.replace("{answer}", answer) + question + after.replace("{answer}", answer)
    if tokenizer.chat_template:
        asked = Template(tokenizer, {}, where).asking([{"role": "user", "content": text}], where)
        return list(tokenizer(asked + settings.begin, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text + settings.begin)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers close every text


def written(task: Task, settings: Alternatives, ids: list[int], number: int) -> str:
    """What the base writes after the tokens: each the greatest of log-probabilities at the temperature and Gumbel noise, a draw."""
    model, tokenizer = task.base.model, task.base.tokenizer
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    heat = settings.temperature
    seeds = [settings.seed, number] if heat else None
    [out] = drawn(
        task.base, [ids], settings.tokens, [seeds], lambda _written, logits: logits.float() / (heat or 1), ends
    )
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    for end in ENDS:
        text = text.partition(end)[0]
    return text.strip()
