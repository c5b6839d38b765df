"""Conversations that call functions: the template is told of the tools, calls keep their arguments. The oracle is transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from spunge.data.items import read_items
from spunge.data.samples import Samples
from spunge.data.selection import select_rows
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from templates import byte_tokenizer, said

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": parameters}}


def called(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


# Rows whose tools and calls would clash as one record: other keys, a number beside a text, an order of their own.
ROWS: list[dict[str, Any]] = [
    {"messages": called(limit=1), "tools": [tool("look", limit={"type": "integer", "default": 1, "enum": [1, 2]})]},
    {
        "messages": called(limit="all", z=[1, "a"]),
        "tools": [tool("look", limit={"type": "string", "default": "all"}), tool("b")],
    },
    {
        "messages": called(where={"x": 1.5, "deep": {"k": True}}),
        "tools": [tool("c", q={"type": "number", "default": 2.0})],
    },
    {"messages": said("no tools", "here"), "tools": None},
    {"messages": said("none", "here"), "tools": []},
]


def expected(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False))


def texts(samples: Samples, tokenizer: Any) -> list[str]:
    return [text.prompt + text.completion for text in samples.texts(range(len(samples)), tokenizer)]


def recipe(file: Path) -> Any:
    return load_recipe(
        {
            "model": {"path": "m"},
            "forget": {"source": str(file), "messages": "messages"},
            "unlearn": {"method": "ga"},
            "evaluate": [{"kind": "perplexity", "messages": "messages"}],
        }
    )


FORMS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "a column": lambda rows: rows,
    "JSON text": lambda rows: [{**row, "tools": json.dumps(row["tools"])} for row in rows],
    "a list of JSON texts": lambda rows: [
        {**row, "tools": row["tools"] and [*map(json.dumps, row["tools"])]} for row in rows
    ],
    "beside the messages": lambda rows: [{"messages": row} for row in rows],
    "beside the messages, as text": lambda rows: [{"messages": json.dumps(row)} for row in rows],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_template_is_told_of_a_rows_tools_in_training_and_in_judging(
    write_rows: Callable[..., Path], form: str
) -> None:
    tokenizer, read = byte_tokenizer(TEMPLATE), recipe(write_rows("chats.jsonl", FORMS[form](ROWS)))
    wanted = [expected(row, tokenizer) for row in ROWS]
    [part] = split_rows(read).parts
    assert texts(part.samples, tokenizer) == wanted
    assert texts(select_rows(read.forget, read, "retain").samples, tokenizer) == wanted
    items = read_items(read, read.evaluate[0], {"messages": "messages"}, "evaluate.0")
    assert texts(Samples(items.table), tokenizer) == wanted


def test_of_a_parquet_file_the_arguments_are_not_padded_with_those_of_other_rows(tmp_path: Path) -> None:
    calls = [{"messages": called(limit=1), "tools": [tool("look", limit={"type": "integer"})]}]
    calls += [{"messages": called(where="x"), "tools": [tool("look", where={"type": "string"})]}]
    datasets.Dataset.from_list(calls).to_parquet(tmp_path / "chats.parquet")
    tokenizer = byte_tokenizer(TEMPLATE)
    [part] = split_rows(recipe(tmp_path / "chats.parquet")).parts
    assert texts(part.samples, tokenizer) == [expected(row, tokenizer) for row in calls]


@pytest.mark.parametrize("tools", ["look", [1], {"a": 1, "b": "x"}, ["look"]])
def test_what_is_no_list_of_tools_is_refused_with_its_row(write_rows: Callable[..., Path], tools: Any) -> None:
    file = write_rows("chats.jsonl", [{"messages": said("q", "a"), "tools": tools}])
    if isinstance(tools, dict):
        assert split_rows(recipe(file)).parts  # one tool by itself
        return
    with pytest.raises(RecipeError, match=r"^forget: row 1 of chats.jsonl: tools"):
        split_rows(recipe(file))
