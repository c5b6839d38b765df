"""Conversations through a tokenizer's chat template, and which characters of what it writes are learned.

Where the template marks the assistant's text itself ({% generation %}), the marks decide. Elsewhere the answer is found by
comparison: the conversation is rendered once more with another text in the answer's place, and what differs is the answer. It
begins where the prompt for an answer ends (so that an empty thinking block, which the model has to write, is learned), or,
where the template writes a whole conversation otherwise than that prompt, with its own first character. Never is more of a
conversation learned than the assistant's turns.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from spunge.data.bounds import BeyondBoundsError, bounded, holds_power
from spunge.data.chat import Conversation, Message
from spunge.errors import RecipeError

STAND_IN = "\ue0f0\ue0f1"  # takes an answer's place: private characters, which no text has
# A template that writes the day would make a delta depend on when it is made. This day is what Llama 3.1's writes without a clock.
DAY = datetime.date(2024, 7, 26)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """What a template wrote."""

    text: str
    scored: list[tuple[int, int]]  # [start, stop) of the characters that are learned, ascending
    ends: bool  # the tokenizer's end token belongs after the text, as the template writes none


class Span(NamedTuple):
    start: int
    stop: int


class Template:
    """A tokenizer's chat template with the variables that it is told."""

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any], setting: str) -> None:
        """Raises RecipeError where the tokenizer has no template."""
        self._tokenizer, self._variables = tokenizer, variables
        self._stopped: BeyondBoundsError | None = None
        if not tokenizer.chat_template:
            raise RecipeError(
                f"{setting}: the model's tokenizer has no chat template; give prompt and completion as plain text, without chat"
            )
        source = str(self._told(setting, tokenizer.get_chat_template))
        if self._told(setting, lambda: holds_power(source)):
            raise RecipeError(
                f"{setting}: the model's chat template takes a power (**), which may go on for ever; take it out"
            )
        self._source = TODAY.sub(lambda call: json.dumps(DAY.strftime(call[2])), source)

    def text(self, messages: Sequence[Message], where: str, *, asked: bool = False) -> str:
        """The rendered messages; asked: with the beginning of the assistant's next one. Raises RecipeError where it objects."""
        return str(
            self._told(
                where,
                lambda: self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._source,
                    tokenize=False,
                    add_generation_prompt=asked,
                    **self._variables,
                ),
            )
        )

    def asking(self, messages: Sequence[Message], where: str) -> str:
        """The prompt for an answer to messages, contents as text or, where the template takes no text, in parts: many of models of
        texts and images write nothing of a text. Raises RecipeError where it objects, or leaves the last message out."""
        first: RecipeError | None = None
        for form in (lambda message: message, _in_parts):
            try:
                if STAND_IN in self.text(
                    [form(each) for each in [*messages[:-1], _said_else(messages[-1])]], where, asked=True
                ):
                    return self.text([form(each) for each in messages], where, asked=True)
            except RecipeError as error:
                first = first or error
        raise first or RecipeError(f"{where}: the model's chat template leaves what is asked out")

    def marked(self, messages: Sequence[Message], where: str) -> list[Span] | None:
        """The characters that the template itself marks as the assistant's; None where it marks none."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not MARKED.search(self._source):
            return None
        # The tokenizer gives the marks by token, and the rest of the conversation where a mark ends in a character of no token.
        _, marks = self._told(
            where,
            lambda: render_jinja_template(
                [list(messages)],
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._variables},
            ),
        )
        return [Span(*mark) for mark in marks[0]]

    @cached_property
    def control(self) -> list[str]:
        """The texts of the tokenizer's special and added tokens."""
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        return [token for token in {*self._tokenizer.all_special_tokens, *added} if token.strip()]

    def _told(self, where: str, render: Any) -> Any:
        try:
            if self._stopped:  # other forms of a conversation would take as long
                raise self._stopped
            return bounded(render)
        except Exception as error:  # a template is a program that came with the model, and may raise anything
            self._stopped = error if isinstance(error, BeyondBoundsError) else None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecipeError(f"{where}: the model's chat template does not take the conversation: {reason}") from None


def render(conversation: Conversation, template: Template, where: str) -> Rendered:
    """A conversation up to its last learned message, and the characters that are learned. `where` names the row in errors.

    Raises RecipeError where the template objects, leaves the answer out, or does not write the wanted end.
    """
    turns = _accepted(conversation, template, where)
    learned, end = conversation.learned, conversation.end
    text, ends = turns.text, False
    inside = turns.marks(learned) if turns.marked is not None else turns.compared(learned)
    for number in learned:
        content, tail = turns.content(number), turns.tail(number)
        last = number == learned[-1]
        if end == "none":
            inside[content.stop : content.stop + len(tail)] = False
            continue
        length = _end_length(tail, end, template.control)
        if length is None:
            raise RecipeError(
                f"{where}: answer_end {end!r} is not what the chat template writes after an answer: {tail!r}"
            )
        if length == 0 and last:
            # Nothing but spaces follow, which are no end.
            text, ends = (text[: content.stop], True) if end == "auto" else (text[: content.stop] + end, False)
            inside = np.concatenate([inside[: content.stop], np.ones(len(text) - content.stop, dtype=bool)])
            continue
        inside[content.stop : content.stop + length] = True
        if end != "auto":
            inside[content.stop + length : content.stop + len(tail)] = False
    spans = list(_spans(inside))
    if not spans:
        raise RecipeError(f"{where}: the chat template marks nothing of the answer as the assistant's")
    return Rendered(text, spans, ends)


def _end_length(tail: str, end: str, control: Sequence[str]) -> int | None:
    """Characters from an answer's last one up to its end: through the first special token and those that follow it at once,
    or, where there is none, through any text.

    0 where only spaces follow; None where the wanted text does not.
    """
    if end != "auto":
        if end in tail:
            return tail.index(end) + len(end)
        return None if tail.strip() else 0
    first = min((tail.index(token) for token in control if token in tail), default=None)
    if first is None:
        return len(tail.rstrip())
    while following := max((len(token) for token in control if tail.startswith(token, first)), default=0):
        first += following
    return first


class Turns:
    """A rendered conversation whose messages can be found in it."""

    def __init__(self, messages: list[Message], template: Template, where: str) -> None:
        self._messages, self._template, self._where = messages, template, where
        self.text = template.text(messages, where)
        self.marked = template.marked(messages, where)
        self._refuse_lost_calls()
        self._contents: dict[int, Span] = {}
        self._ended: dict[int, tuple[str, Span | None]] = {}

    def _refuse_lost_calls(self) -> None:
        for number, message in enumerate(self._messages):
            if "tool_calls" not in message:
                continue
            silent = {key: value for key, value in message.items() if key != "tool_calls"}
            try:
                without = self._template.text(
                    [*self._messages[:number], silent, *self._messages[number + 1 :]], self._where
                )
            except RecipeError:
                continue  # it misses them
            if without == self.text:
                raise RecipeError(f"{self._where}: the chat template leaves the tool calls of messages[{number}] out")

    def shows(self, number: int, messages: Sequence[Message]) -> bool:
        """Whether a user's message, as it is among `messages`, is written at all; of others nothing is asked."""
        said = messages[number]
        if said["role"] != "user" or str(said["content"]).strip() in self.text:
            return True
        try:
            self._differing(self._messages, number, self.text)
        except RecipeError:
            return False
        return True

    def content(self, number: int) -> Span:
        """Where an assistant's message stands, without what is written around every message. Raises where it is left out."""
        if number == len(self._messages) - 1:
            return self._last
        if number not in self._contents:
            alone, span = self._alone(number)
            # Other than in the whole where a template writes earlier messages otherwise, such as without their thoughts.
            shared = span is not None and _common(self.text, alone) >= span.stop
            self._contents[number] = span if span and shared else self._differing(self._messages, number, self.text)
        return self._contents[number]

    @cached_property
    def _last(self) -> Span:
        return self._differing(self._messages, len(self._messages) - 1, self.text)

    def _alone(self, number: int) -> tuple[str, Span | None]:
        """The conversation that ends with a message, and where the message stands in it: there nothing after it changes with
        it, as a tool's result may. None where no conversation may end there.
        """
        if number not in self._ended:
            messages = self._messages[: number + 1]
            try:
                text = self._template.text(messages, self._where)
                self._ended[number] = text, self._differing(messages, number, text)
            except RecipeError:
                self._ended[number] = "", None
        return self._ended[number]

    def compared(self, learned: Sequence[int]) -> np.ndarray:
        """Which characters belong to the learned messages, by comparison."""
        inside = np.zeros(len(self.text), dtype=bool)
        for number in learned:
            content = self.content(number)
            inside[self._beginning(number, content) : content.stop] = True
        return inside

    def marks(self, learned: Sequence[int]) -> np.ndarray:
        """Which characters of the learned messages the template marks."""
        inside = np.zeros(len(self.text), dtype=bool)
        answers = [
            number for number in range(learned[0], learned[-1] + 1) if self._messages[number]["role"] == "assistant"
        ]
        # Where every answer is learned, no other needs to be looked for.
        starts = {
            number: self.content(number).start for number in (learned[:1] if len(answers) == len(learned) else answers)
        }
        for mark in self.marked or []:
            # A mark is of the last answer that begins before it ends; marks of earlier messages end before all of these.
            owner = max((number for number, start in starts.items() if start < mark.stop), default=None)
            if owner in learned:
                inside[mark.start : mark.stop] = True
        return inside

    def tail(self, number: int) -> str:
        """What follows an answer and would follow it if it were the last: the end of the turn."""
        after = self.text[self.content(number).stop :]
        if number == len(self._messages) - 1:
            return after
        alone, span = self._alone(number)
        own = "" if span is None else alone[span.stop :]
        shared = own[: _common(after, own)]
        # What is shared by chance, such as the `<|` of two tokens, ends nothing.
        return shared if shared == own or any(token in shared for token in self._template.control) else ""

    def _beginning(self, number: int, content: Span) -> int:
        """Where the prompt for an answer ends, if the conversation begins with that prompt."""
        try:
            asked = self._template.text(self._messages[:number], self._where, asked=True)
            before = self._differing(self._messages, number - 1, self.text)
        except RecipeError:
            return content.start  # nothing comes before that could be asked
        # The words of the message before are the prompt's, whatever the template makes of a prompt.
        begun = self.text.startswith(asked) and before.stop <= len(asked) < content.stop
        return len(asked) if begun else content.start

    def _differing(self, messages: Sequence[Message], number: int, text: str) -> Span:
        """Where a rendered conversation changes when a message says something else."""
        other = self._with_another(messages, number)
        if other == text or STAND_IN not in other:
            raise RecipeError(f"{self._where}: the chat template leaves messages[{number}] out")
        start = _common(text, other)
        return Span(start, len(text) - _common(text[start:][::-1], other[start:][::-1]))

    def _with_another(self, messages: Sequence[Message], number: int) -> str:
        """The conversation with a stand-in for a message; where the template then misses a tool call, for that call."""
        message = messages[number]
        plain = {"role": message["role"], "content": STAND_IN}
        if isinstance(message["content"], list):
            plain = _in_parts(plain)
        try:
            return self._template.text([*messages[:number], plain, *messages[number + 1 :]], self._where)
        except RecipeError:
            if not message.get("tool_calls"):
                raise
        call = {"name": STAND_IN, "arguments": {STAND_IN: STAND_IN}}
        calls = [{**each, "function": call} for each in message["tool_calls"]]
        called = {**plain, "tool_calls": calls}
        return self._template.text([*messages[:number], called, *messages[number + 1 :]], self._where)


def _accepted(conversation: Conversation, template: Template, where: str) -> "Turns":
    """The messages up to the last learned one, in the form that the template takes: as they are, with tool calls' arguments as
    JSON text, or with contents in parts, as many models of text and images have it."""
    messages = conversation.messages[: conversation.learned[-1] + 1]
    first: RecipeError | None = None
    without: Turns | None = None  # what was asked: some templates show no form of it
    for form in (lambda message: message, _with_written_arguments, _in_parts):
        try:
            turns = Turns([form(message) for message in messages], template, where)
            for number in conversation.learned:
                turns.content(number)
        except RecipeError as error:
            first = first or error
            continue
        if all(turns.shows(number - 1, messages) for number in conversation.learned if number):
            return turns
        without = without or turns
    if without is not None:
        return without
    assert first is not None
    raise first


def _said_else(message: Message) -> Message:
    return {**message, "content": STAND_IN}


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_written_arguments(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        **message,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ],
    }


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    length = min(len(one), len(other))
    left, right = (
        np.frombuffer(each[:length].encode("utf-32-le", "surrogatepass"), np.uint32) for each in (one, other)
    )
    differ = np.flatnonzero(left != right)
    return int(differ[0]) if len(differ) else length


def _spans(inside: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of true values, as [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(np.int8), [0]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
