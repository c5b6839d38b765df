"""Conversations in the shapes that people keep them in, read as one: a list of messages {role, content, ...}.

Read are {role, content} and ShareGPT's {from, value}, content as text or as a list of text parts, lists kept key by key
({role: [...], content: [...]}), the list as JSON text, and tool calls with arguments as a mapping or as JSON text. What is none
of these is refused in one line that names the row and the message.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spunge.errors import RecipeError, suggestion

Message = dict[str, Any]

CALLS = ("function_call", "tool_call")  # ShareGPT's names for an assistant's message that is a call
ROLES: dict[str, str] = {
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(
        ["assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bing", "bard", "claude"], "assistant"
    ),
    **dict.fromkeys(["tool", "observation", "function", "function_response", "tool_response", "ipython"], "tool"),
    **dict.fromkeys(CALLS, "assistant"),
    "system": "system",
    "developer": "developer",
}
LISTS = ("messages", "conversations", "conversation")  # keys of an object that may hold the list
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """Messages, and what of them is learned: the assistant's from `start` on, all or the last alone."""

    messages: list[Message]
    start: int = 0
    learn: Literal["last", "all"] = "last"
    end: str = "auto"  # auto, none, or the text that ends an answer
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template

    def to_json(self) -> str:
        """One line. What a sample is made of stands in it whole, so that equal lines are equal samples."""
        return json.dumps(vars(self), ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, line: str) -> "Conversation":
        return cls(**json.loads(line))

    @property
    def learned(self) -> list[int]:
        """Which messages are learned, by number; at least one."""
        answers = [
            number
            for number, message in enumerate(self.messages)
            if number >= self.start and message["role"] == "assistant"
        ]
        return answers if self.learn == "all" else answers[-1:]

    @property
    def answer(self) -> Message:
        """The last message that is learned."""
        return self.messages[self.learned[-1]]

    def answered(self, answer: Message) -> "Conversation":
        """The same with this message in place of every one that is learned."""
        learned = set(self.learned)
        messages = [answer if number in learned else message for number, message in enumerate(self.messages)]
        return replace(self, messages=messages)


def read_messages(value: Any, where: str) -> list[Message]:
    """A conversation's messages. `where` names the setting and the row in errors. Raises RecipeError for an unknown shape."""
    listed = _listed(value, where)
    if not listed:
        raise RecipeError(f"{where}: the conversation has no messages")
    return [_message(raw, f"{where}: messages[{number}]") for number, raw in enumerate(listed)]


def read_conversation(value: Any, where: str) -> list[Message]:
    """A conversation's messages, of which one at least is the assistant's. Raises RecipeError for any other."""
    messages = read_messages(value, where)
    _require_answer(messages, where)
    return messages


def read_pair(prompt: Any, completion: Any, where: str) -> tuple[list[Message], int]:
    """The messages of a prompt and its completion, each a text or messages, and the number of the completion's first.

    The space that joins two texts is no part of either message. Raises RecipeError where no answer is left.
    """
    before = [_said("user", prompt.rstrip())] if isinstance(prompt, str) else read_messages(prompt, f"{where}: prompt")
    after = (
        [_said("assistant", completion.strip())]
        if isinstance(completion, str)
        else read_messages(completion, f"{where}: completion")
    )
    _require_answer(after, f"{where}: completion")
    return [*before, *after], len(before)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _require_answer(messages: Sequence[Message], where: str) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise RecipeError(f"{where}: no message is the assistant's, so there is nothing to learn; filter the row out")


def _listed(value: Any, where: str) -> list[Any]:
    """The list of raw messages in whatever holds it."""
    if isinstance(value, str):
        value = _parsed(value, where)
    if isinstance(value, Mapping):
        for key in LISTS:
            if isinstance(value.get(key), list | str):
                return _listed(value[key], where)
        columns = {key: each for key, each in value.items() if each is not None}
        if columns and all(isinstance(each, list) for each in columns.values()):
            return _by_message(columns, where)
    if not isinstance(value, list):
        raise RecipeError(f"{where}: a conversation is a list of messages, and this is {_kind(value)}")
    return value


def _by_message(columns: Mapping[str, list[Any]], where: str) -> list[dict[str, Any]]:
    """{role: [...], content: [...]} -> [{role, content}, ...]"""
    if len({len(each) for each in columns.values()}) > 1:
        raise RecipeError(f"{where}: {', '.join(columns)} are lists of unequal lengths")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _parsed(text: str, where: str) -> Any:
    """JSON, or the Python literal that a data frame writes into CSV."""
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecipeError(f"{where}: {_short(text)} is text, and no JSON that holds messages") from None


def _message(raw: Any, where: str) -> Message:
    if isinstance(raw, str) and raw.lstrip().startswith("{"):
        raw = _parsed(raw, where)
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where} is {_kind(raw)}; a message is {{role, content}} or {{from, value}}")
    given = {str(key): _without_nulls(value) for key, value in raw.items() if value is not None}
    name = given.pop("role", None) or given.pop("from", None)
    role = ROLES.get(str(name).strip().lower()) if name else None
    if role is None:
        said = "has no role" if not name else f"has the role {name!r}{suggestion(str(name), ROLES)}"
        raise RecipeError(
            f"{where} {said}; known: {', '.join(dict.fromkeys(ROLES.values()))}, and their ShareGPT names"
        )
    content = next((given.pop(key) for key in ("content", "value", "text") if key in given), None)
    called = _called(content) if str(name).strip().lower() in CALLS else []
    calls = called or _tool_calls(given, where)
    content = None if called else content
    rest = {key: value for key, value in given.items() if key not in ("from", "tool_calls", "function_call")}
    if calls:
        rest["tool_calls"] = calls
    thoughts = any(rest.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
    if content is None and not (role == "assistant" and (calls or thoughts)):
        raise RecipeError(f"{where} ({role}) has no content; filter the row out, or give it one")
    text = "" if content is None else _text(content, f"{where}.content")
    if role == "assistant" and not text.strip() and not (calls or thoughts):
        raise RecipeError(f"{where} ({role}) has an empty content; filter the row out, or give it one")
    return {"role": role, "content": text, **rest}


def _text(content: Any, where: str) -> str:
    """A message's content as one text; the parts of a list are set on lines of their own."""
    if isinstance(content, str):
        written = _written_parts(content)
        if written is None:
            return content
        content = written
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise RecipeError(f"{where} is {_kind(content)}, not text")
    return "\n".join(_part(part, where) for part in content)


def _written_parts(content: str) -> Any:
    """Parts that stand as JSON in a text: what a reader makes of them where other messages of the column hold text."""
    if not content.startswith(('[{"type"', '{"type"')):
        return None
    with suppress(json.JSONDecodeError):
        parts = json.loads(content)
        every = parts if isinstance(parts, list) else [parts]
        if all(isinstance(part, dict) and isinstance(part.get("type"), str) and len(part) > 1 for part in every):
            return parts
    return None


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RecipeError(f"{where} has a part of type {kind!r}; only parts of text can be learned")
    return str(part["text"])


def _tool_calls(given: Mapping[str, Any], where: str) -> list[Any]:
    """The calls of a message in transformers' form: [{type: function, function: {name, arguments: mapping}}]."""
    calls = given.get("tool_calls") or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"{where}.tool_calls") or []
    if not calls and "function_call" in given:  # as OpenAI's older API wrote a single call
        calls = [given["function_call"]]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RecipeError(f"{where}.tool_calls is {_kind(calls)}, not a list of calls")
    return [_call(dict(call)) for call in calls]


def _called(content: Any) -> list[Any]:
    """The calls that ShareGPT's function_call writes as its text; none where it is another notation, learned as it reads."""
    try:
        calls = json.loads(content) if isinstance(content, str) else None
    except json.JSONDecodeError:
        return []
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call) for call in calls] if all(isinstance(call, dict) and "name" in call for call in calls) else []


def _call(call: dict[str, Any]) -> dict[str, Any]:
    inner = dict(call["function"]) if isinstance(call.get("function"), Mapping) else call
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        # A template writes arguments as JSON itself; text would be quoted twice.
        with suppress(json.JSONDecodeError):
            arguments = json.loads(arguments)
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else {"type": "function", "function": inner}


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null: Arrow gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), type(value).__name__) + (f" ({_short(value)})" if isinstance(value, str) else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
