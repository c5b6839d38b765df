"""Conversations in the shapes that people keep them in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spunge.data.chat import Conversation, read_conversation, read_pair
from spunge.data.samples import Rendering, Samples, sample_table
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from templates import said

PLAIN = said("the question", "the reply", system="be brief")
NAMED = [("system", "be brief"), ("human", "the question"), ("gpt", "the reply")]


def parts(kind: str = "text") -> list[dict[str, Any]]:
    return [{"role": m["role"], "content": [{"type": kind, "text": m["content"]}]} for m in PLAIN]


SHAPES: dict[str, Any] = {
    "role and content": PLAIN,
    "ShareGPT": [{"from": role, "value": text} for role, text in NAMED],
    "ShareGPT with other names": [
        {"from": role, "value": text}
        for role, text in [("system", "be brief"), ("User", "the question"), ("chatgpt", "the reply")]
    ],
    "roles with ShareGPT's values": [{"role": role, "value": text} for role, text in NAMED],
    "parts": parts(),
    "parts of OpenAI's newer API": parts("input_text"),
    "a single part": [{**m, "content": {"type": "text", "text": m["content"]}} for m in PLAIN],
    "parts without a type": [{**m, "content": [m["content"]]} for m in PLAIN],
    "parts in some messages, as a reader gives them": [
        {**m, "content": json.dumps([{"type": "text", "text": m["content"]}])} if m["role"] == "user" else m
        for m in PLAIN
    ],
    "JSON text": json.dumps(PLAIN),
    "JSON text of an object": json.dumps(
        {"id": 7, "conversations": [{"from": role, "value": text} for role, text in NAMED]}
    ),
    "Python text, as a data frame writes it to CSV": str(PLAIN),
    "an object that holds the list": {"messages": PLAIN, "id": 7},
    "messages as JSON texts": [json.dumps(m) for m in PLAIN],
    "lists key by key": {"role": [m["role"] for m in PLAIN], "content": [m["content"] for m in PLAIN]},
    "with the keys of other rows": [{**m, "tool_calls": None, "name": None, "weight": None} for m in PLAIN],
    "Gemma's role": [{**m, "role": "model" if m["role"] == "assistant" else m["role"]} for m in PLAIN],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_common_shape_is_read_as_the_same_messages(shape: str) -> None:
    assert read_conversation(SHAPES[shape], "forget.messages: row 3") == PLAIN


def test_keys_that_arrow_fills_in_for_other_rows_are_no_part_of_a_message() -> None:
    calling = [*said("q"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    table = pa.table({"messages": [PLAIN, calling]})
    assert "tool_calls" in table["messages"][0].as_py()[0]
    read = Samples(sample_table(table, Rendering(), "forget", [4, 9]))
    assert Conversation.from_json(read.table["conversation"][0].as_py()).messages == PLAIN


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("prompter", "user"),
        ("gpt", "assistant"),
        ("bard", "assistant"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("ipython", "tool"),
        ("SYSTEM", "system"),
        ("developer", "developer"),
    ],
)
def test_roles_have_one_name(name: str, role: str) -> None:
    messages = read_conversation([{"from": name, "value": "x"}, {"from": "gpt", "value": "y"}], "row 0")
    assert messages[0] == {"role": role, "content": "x"}


FUNCTION = {"name": "look", "arguments": {"where": "here", "deep": {"by": 2}}}
CALL = {"type": "function", "function": FUNCTION}
WRITTEN = {"name": "look", "arguments": json.dumps(FUNCTION["arguments"])}
FILLED = {"name": "look", "arguments": {"where": "here", "deep": {"by": 2, "than": None}, "other": None}}  # by Arrow


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": WRITTEN}]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FILLED}]},
        {"role": "assistant", "content": None, "tool_calls": [FUNCTION]},
        {"role": "assistant", "content": None, "function_call": WRITTEN},
        {"from": "function_call", "value": json.dumps(FUNCTION)},
    ],
)
def test_a_tool_call_without_content_is_read_with_its_arguments(message: dict[str, Any]) -> None:
    messages = read_conversation([*said("q"), message, {"role": "tool", "content": "found"}], "row 0")
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2] == {"role": "tool", "content": "found"}


def test_a_call_in_a_notation_of_its_own_is_learned_as_it_reads() -> None:
    messages = read_conversation(
        [{"from": "human", "value": "q"}, {"from": "function_call", "value": "look(here)"}], "row 0"
    )
    assert messages[1] == {"role": "assistant", "content": "look(here)"}


def test_rows_with_text_and_rows_with_parts_are_read_alike_from_one_file(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    rows = [{"m": PLAIN, "topic": "a"}, {"m": parts(), "topic": "a"}, {"m": SHAPES["ShareGPT"], "topic": "a"}]
    toy_recipe["forget"] = {"source": str(write_rows("rows.jsonl", rows)), "messages": "m"}
    [part] = split_rows(load_recipe(toy_recipe)).parts
    read = [Conversation.from_json(line).messages for line in part.samples.table["conversation"].to_pylist()]
    assert read == [PLAIN] * 3


def test_a_text_that_looks_like_json_is_a_text() -> None:
    for text in ('{"type": "fruit"}', '[{"type": 1}]', '{"type"', "[1, 2]", '{"kind": "x", "text": "y"}'):
        assert read_conversation(said("q", text), "row 0")[1]["content"] == text


def test_thoughts_beside_an_answer_are_kept() -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "t"}
    assert read_conversation([*said("q"), thought], "row 0")[1] == thought


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "is null"),
        ([], "no messages"),
        ("[]", "no messages"),
        ("hello there", "'hello there' is text, and no JSON"),
        (7, "this is int"),
        (["hello", "you too"], r"messages\[0\] is a text \('hello'\)"),
        ([["user", "hello"]], r"messages\[0\] is a list"),
        (
            [{"speaker": "me", "utterance": "hello"}],
            r"messages\[0\] has neither `role` nor `from`, but speaker, utterance",
        ),
        ([*said("q"), {"role": "narrator", "content": "x"}], r"messages\[1\] has the role 'narrator'"),
        ([{"role": "asistant", "content": "x"}], r"did you mean 'assistant'\?"),
        ([*said("q"), {"role": "assistant", "content": None}], r"messages\[1\] \(assistant\) has no content"),
        ([{"role": "user", "content": None}, *said("q", "a")], r"messages\[0\] \(user\) has no content"),
        ([*said("q"), {"role": "assistant", "content": " \n"}], r"messages\[1\] \(assistant\) has an empty content"),
        ([*said("q"), {"role": "assistant", "content": 7}], r"messages\[1\].content is int"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], r"content has a part of type 'image'"),
        (
            [*said("q"), {"role": "assistant", "content": "", "tool_calls": "look"}],
            r"messages\[1\].tool_calls: 'look' is text",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": ["look"]}], r"tool_calls is a list, not a list of calls"),
        (said("q"), "no message is the assistant's"),
        ({"role": ["user"], "content": ["a", "b"]}, "lists of unequal lengths"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line_with_its_row(value: Any, wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted) as caught:
        read_conversation(value, "forget.messages: row 3")
    assert str(caught.value).startswith("forget.messages: row 3")
    assert "\n" not in str(caught.value)


def test_a_bad_row_is_named_by_its_number_in_the_source() -> None:
    table = pa.table({"messages": [json.dumps(PLAIN), json.dumps(said("q"))]})
    with pytest.raises(RecipeError, match=r"^retain\.messages: row 41: no message is the assistant's"):
        sample_table(table, Rendering(), "retain", [7, 41])


@pytest.mark.parametrize(
    ("prompt", "completion", "messages", "start"),
    [
        ("the question ", " the reply", said("the question", "the reply"), 1),
        (said("the question", system="be brief"), said("", "the reply")[1:], PLAIN, 2),
        (said("the question", system="be brief"), " the reply", PLAIN, 2),
        ("the question", said("", "the reply")[1:], said("the question", "the reply"), 1),
        (said("q1", "a1", "q2"), said("", "a2")[1:], said("q1", "a1", "q2", "a2"), 3),
    ],
)
def test_a_prompt_and_a_completion_may_be_texts_or_messages(
    prompt: Any, completion: Any, messages: list[dict[str, Any]], start: int
) -> None:
    assert read_pair(prompt, completion, "row 0") == (messages, start)
    learned = Conversation(messages, start, learn="all").learned
    assert learned == [len(messages) - 1]  # an answer of the prompt's is not learned


def test_columns_of_messages_are_read_as_a_conversation_without_being_told() -> None:
    table = pa.table({"prompt": [said("the question")], "completion": [said("", "the reply")[1:]]})
    read = Samples(sample_table(table, Rendering(), "forget", [0]))
    assert Conversation.from_json(read.table["conversation"][0].as_py()).messages == said("the question", "the reply")
    assert "conversations, through the chat template" in read.form


def test_equal_conversations_are_equal_samples_whatever_their_shape_and_row() -> None:
    prints = {
        Samples(sample_table(pa.table({"messages": pa.array([value])}), Rendering(), "forget", [row])).sha256
        for row, value in enumerate(
            [PLAIN, json.dumps(PLAIN), [{"from": role, "value": text} for role, text in NAMED], parts()]
        )
    }
    assert len(prints) == 1
    table = pa.table({"messages": pa.array([PLAIN])})
    for change in ({"learn": "all"}, {"end": "none"}, {"variables": {"enable_thinking": False}}):
        prints.add(Samples(sample_table(table, Rendering(**change), "forget", [0])).sha256)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("first", "second", "learn", "learned"),
    [
        ({"weight": 0}, {"weight": 1}, "all", [3]),
        ({"weight": 1}, {"weight": 0}, "all", [1]),
        ({"weight": 1.0}, {"weight": 0.0}, "last", [1]),  # the last that may be learned
        ({"train": False}, {"train": True}, "all", [3]),
        ({"train": True}, {}, "all", [1, 3]),
    ],
)
def test_a_message_that_says_so_is_not_learned(
    first: dict[str, Any], second: dict[str, Any], learn: Any, learned: list[int]
) -> None:
    talk = said("q", "a", "r", "b")
    talk = [talk[0], {**talk[1], **first}, talk[2], {**talk[3], **second}]
    named = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": named[m["role"]], "value": m["content"], **{key: m[key] for key in ("weight", "train") if key in m}}
        for m in talk
    ]
    for shape in (talk, sharegpt, json.dumps(talk)):
        assert Conversation(read_conversation(shape, "row 1"), learn=learn).learned == learned


@pytest.mark.parametrize(
    ("mark", "wanted"),
    [
        ({"weight": 0}, "every message of the assistant's has the weight 0, so there is nothing to learn"),
        ({"weight": 0.5}, r"messages\[1\].weight is 0.5; a message is learned \(1\) or not \(0\)"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, r"messages\[1\].train_detail"),
    ],
)
def test_marks_that_leave_nothing_or_are_in_between_are_refused(mark: dict[str, Any], wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted):
        read_conversation([*said("q"), {"role": "assistant", "content": "a", **mark}], "forget.messages: row 3")


def test_pictures_that_stand_as_json_in_a_text_are_refused_as_pictures_are() -> None:
    # What a reader gives where other messages of the column hold text.
    for part in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}):
        content = json.dumps([part, {"type": "text", "text": "what is it?"}])
        with pytest.raises(RecipeError, match=f"has a part of type '{part['type']}'"):
            read_conversation([{"role": "user", "content": content}, *said("", "a")[1:]], "row 3")


WHOLE = said("the question", "the reply")


@pytest.mark.parametrize(
    ("prompt", "completion", "messages", "start"),
    [
        ("the question", WHOLE, WHOLE, 1),  # UltraFeedback's: `chosen` is the whole conversation
        ("the question\n", WHOLE, WHOLE, 1),
        (WHOLE[:1], WHOLE, WHOLE, 1),
        ("the question", PLAIN, PLAIN, 2),  # with a system message that the prompt does not have
        (said("q", "a", "r"), said("q", "a", "r", "b"), said("q", "a", "r", "b"), 3),
    ],
)
def test_a_prompt_that_the_completion_says_again_is_said_once(
    prompt: Any, completion: Any, messages: list[dict[str, Any]], start: int
) -> None:
    assert read_pair(prompt, completion, "row 0") == (messages, start)


def test_a_completion_that_begins_with_another_question_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="row 0: completion begins with a message of the user's that is not the prompt"
    ):
        read_pair("another", WHOLE, "row 0")


@pytest.mark.parametrize("chosen", [WHOLE, WHOLE[1:], json.loads(json.dumps(WHOLE))])
@pytest.mark.parametrize("form", ["messages", "pair of messages", "pair of texts"])
def test_an_answer_to_prefer_may_be_the_last_message_of_a_list(form: str, chosen: list[dict[str, Any]]) -> None:
    rejected = [*said("the question"), {"role": "assistant", "content": "the secret"}]
    columns: dict[str, list[Any]] = {
        "messages": {"messages": [rejected]},
        "pair of messages": {"prompt": [rejected[:1]], "completion": [rejected[1:]]},
        "pair of texts": {"prompt": ["the question"], "completion": [" the secret"]},
    }[form]
    table = sample_table(pa.table({**columns, "refusal": [chosen]}), Rendering(), "forget", [7])
    assert table["refusal"].to_pylist() == ["the reply"]
    with pytest.raises(RecipeError, match=r"forget\.refusal: row 7: its last message is no text of the assistant's"):
        sample_table(pa.table({**columns, "refusal": [WHOLE[:1]]}), Rendering(), "forget", [7])


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"a":' * 100_000, '[{"role": "user", "content": ' + "9" * 5000]
)
def test_text_that_no_parser_takes_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^row 1: .* is text, and no JSON that holds messages"):
        read_conversation(text, "row 1")
