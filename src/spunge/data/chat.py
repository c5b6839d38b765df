"""Conversations in the shapes that people keep them in, read as one: a list of messages {role, content, ...}.

Read are {role, content} and ShareGPT's {from, value}, content as text or as a list of text parts, lists kept key by key
({role: [...], content: [...]}), the list as JSON text, and tool calls with arguments as a mapping or as JSON text. A message
may say that it is not learned: `weight: 0` (OpenAI's, Mistral's) or `train: false` (axolotl's). What is none of these is refused
in one line that names the row and the message.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spunge.data.kinds import FREE
from spunge.errors import RecipeError
from spunge.files import parse_json, python_literal

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
MEDIA = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "audio_url",
    "video",
    "video_url",
    "file",
    "input_file",
)
LEARNED = ("weight", "train")  # keys of a message that say whether it is learned
UNLEARNED = {"weight": 0}  # what stands in a message that is not


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
            number for number, message in enumerate(self.messages) if number >= self.start and _is_learned(message)
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


def read_tools(value: Any, where: str) -> list[Any]:
    """The tools of a row, as a chat template is told of them: descriptions of functions, each as an object or as JSON text.
    Raises RecipeError for what is no list of them."""
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else None
    if value is None:
        return []
    tools = []
    for number, raw in enumerate(value if isinstance(value, list) else [value]):
        tool = _parsed(raw, f"{where}[{number}]") if isinstance(raw, str) else raw
        if not isinstance(tool, Mapping):
            raise RecipeError(f"{where}[{number}] is {_kind(tool)}; a tool is an object that describes a function")
        tools.append(_without_nulls(_with_objects(tool)))
    return tools


def _with_objects(tool: Mapping[str, Any]) -> dict[str, Any]:
    """With what a reader keeps as JSON text (see `kinds.FREE`) as objects."""
    opened = {key: _object(value) if key in FREE else value for key, value in tool.items()}
    return {key: _with_objects(value) if isinstance(value, Mapping) else value for key, value in opened.items()}


def _object(value: Any) -> Any:
    with suppress(ValueError):
        return parse_json(value) if isinstance(value, str) else value
    return value


def tools_beside(cell: Any) -> Any:
    """The tools that stand beside the messages in one object ({messages: [...], tools: [...]}); None where there are none."""
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        cell = _object(cell)
    return cell.get("tools") if isinstance(cell, Mapping) else None


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
    start = _answered_at(before, after, f"{where}: completion")
    _require_answer(after[start or 0 :], f"{where}: completion")
    return ([*before, *after], len(before)) if start is None else (after, start)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def read_answer(value: Any, where: str) -> str:
    """The text of a conversation's last message, which is the assistant's: the answer that is preferred, as in preference pairs
    whose `chosen` is a list of messages. A text is that text. Raises RecipeError for any other."""
    if isinstance(value, str):
        return value
    last = read_messages(value, where)[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise RecipeError(f"{where}: its last message is no text of the assistant's; filter the row out")
    return str(last["content"])


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _require_answer(messages: Sequence[Message], where: str) -> None:
    if not any(map(_is_learned, messages)):
        own = any(message["role"] == "assistant" for message in messages)
        reason = "every message of the assistant's has the weight 0" if own else "no message is the assistant's"
        raise RecipeError(f"{where}: {reason}, so there is nothing to learn; filter the row out")


def _answered_at(before: Sequence[Message], after: Sequence[Message], where: str) -> int | None:
    """Where in a completion the answer to the prompt begins, if the completion says the prompt again, as in preference pairs
    whose `chosen` is the whole conversation; None where it does not. Raises RecipeError where it begins with another question."""
    said = [(message["role"], message["content"].strip()) for message in before]
    every = [(message["role"], message["content"].strip()) for message in after]
    for start in range(len(every) - len(said)):
        if every[start : start + len(said)] == said and all(role == "system" for role, _ in every[:start]):
            return start + len(said)
    if before[-1]["role"] == "user" and after[0]["role"] in ("user", "system"):
        raise RecipeError(
            f"{where} begins with a message of the {after[0]['role']}'s that is not the prompt; give it the answer alone, or name "
            "its column as messages"
        )
    return None


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
    with suppress(ValueError):
        return parse_json(text)
    try:
        return python_literal(text)
    except ValueError:
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
        roles = f"roles are {', '.join(dict.fromkeys(ROLES.values()))}, and their ShareGPT names"
        if not name:
            keys = ", ".join(map(str, raw))
            raise RecipeError(f"{where} has neither `role` nor `from`, but {keys}; {roles}")
        near = difflib.get_close_matches(str(name).lower(), ROLES, n=1)
        raise RecipeError(f"{where} has the role {name!r}; {f'did you mean {near[0]!r}?' if near else roles}")
    content = next((given.pop(key) for key in ("content", "value", "text") if key in given), None)
    called = _called(content) if str(name).strip().lower() in CALLS else []
    calls = called or _tool_calls(given, where)
    content = None if called else content
    rest = {key: value for key, value in given.items() if key not in ("from", "tool_calls", "function_call", *LEARNED)}
    if not _weight(given, where):
        rest |= UNLEARNED
    if calls:
        rest["tool_calls"] = calls
    thoughts = any(rest.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
    if content is None and not (role == "assistant" and (calls or thoughts)):
        raise RecipeError(f"{where} ({role}) has no content; filter the row out, or give it one")
    text = "" if content is None else _text(content, f"{where}.content")
    if role == "assistant" and not text.strip() and not (calls or thoughts) and "weight" not in rest:
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
    with suppress(ValueError):
        parts = parse_json(content)
        every = parts if isinstance(parts, list) else [parts]
        if all(isinstance(part, dict) and _is_part(part) for part in every):
            return parts
    return None


def _is_part(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("type"), str) and (len(part) > 1 or part["type"] in MEDIA)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS:
        raise RecipeError(f"{where} has a part of type {kind!r}; only parts of text can be learned")
    if not isinstance(part.get("text"), str):
        raise RecipeError(f"{where} has a part without `text`, but {', '.join(map(str, part))}")
    return str(part["text"])


def _weight(given: Mapping[str, Any], where: str) -> bool:
    """Whether a message may be learned, by its own mark. Raises RecipeError for a mark between yes and no."""
    if given.get("train_detail"):
        raise RecipeError(
            f"{where}.train_detail: parts of a message cannot be left unlearned; give `train: true` or `train: false`"
        )
    for key in LEARNED:
        value = given.get(key, True)
        if value not in (0, 1):  # False and True too
            raise RecipeError(f"{where}.{key} is {value!r}; a message is learned (1) or not (0)")
        if not value:
            return False
    return True


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
        calls = parse_json(content) if isinstance(content, str) else None
    except ValueError:
        return []
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call) for call in calls] if all(isinstance(call, dict) and "name" in call for call in calls) else []


def _call(call: dict[str, Any]) -> dict[str, Any]:
    inner = dict(call["function"]) if isinstance(call.get("function"), Mapping) else call
    # A template writes arguments as JSON itself; text would be quoted twice.
    inner = {**inner, "arguments": {}, **{key: _object(value) for key, value in inner.items() if key in FREE}}
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
