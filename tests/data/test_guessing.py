"""Columns are guessed where one guess is sensible, and refused with the columns' names where none is, or several are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spunge.data.guessing import guessed_attribute, guessed_texts
from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.recipe.rows import Source

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def query_of(folder: Path, rows: list[dict[str, Any]]) -> Query:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Query(read_rows([Source(path=str(folder / "rows.jsonl"))], "forget.source"))


def texts_of(folder: Path, row: dict[str, Any], **given: str) -> dict[str, str]:
    return guessed_texts(query_of(folder, [row]), given, "forget", "--text")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a", "topic": "t"}, {"prompt": "question", "completion": "answer"}),
        ({"Instruction": "q", "Response": "a"}, {"prompt": "Instruction", "completion": "Response"}),
        ({"instruction": "q", "input": " ", "output": "a"}, {"prompt": "instruction", "completion": "output"}),
        ({"text": "t", "topic": "t"}, {"text": "text"}),
        ({"messages": TURNS, "id": "1"}, {"messages": "messages"}),
        ({"conversations": json.dumps(TURNS)}, {"messages": "conversations"}),
        ({"tweet": "t"}, {"text": "tweet"}),
        ({"text": 3, "content": "t"}, {"text": "content"}),
    ],
)
def test_usual_names_are_read_as_what_they_hold(tmp_path: Path, row: dict[str, Any], expected: dict[str, str]) -> None:
    assert texts_of(tmp_path, row) == expected


def test_the_input_beside_an_instruction_is_a_line_of_the_prompt_where_there_is_any(tmp_path: Path) -> None:
    query = query_of(
        tmp_path,
        [
            {"instruction": "add", "input": "1 and 2", "output": "3"},
            {"instruction": "sing", "input": "", "output": "la"},
        ],
    )
    texts = guessed_texts(query, {}, "forget", "--text")
    assert query.project(texts, "forget.")["prompt"].to_pylist() == ["add\n1 and 2", "sing"]


def test_what_is_missing_beside_a_given_column_is_guessed(tmp_path: Path) -> None:
    row = {"riddle": "q", "answer": "a", "text": "t"}
    assert texts_of(tmp_path, row, prompt="riddle") == {"prompt": "riddle", "completion": "answer"}
    assert texts_of(tmp_path, row, text="riddle") == {"text": "riddle"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": "x", "b": "y"}, r"forget: no column is called as texts are \(columns: a, b\); give --text"),
        (
            {"text": "t", "question": "q", "answer": "a"},
            r"forget: the texts may be text: text, or prompt: question and completion: answer \(columns: text, question, answer\)",
        ),
        ({"prompt": "p", "answer": "a", "response": "b"}, "may be prompt: prompt and completion: answer, or prompt"),
        ({"messages": TURNS, "text": "t"}, "may be messages: messages, or text: text"),
    ],
)
def test_no_guess_and_several_are_refused_with_the_columns(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        texts_of(tmp_path, row)


def attribute_of(folder: Path, **columns: list[Any]) -> str | None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return guessed_attribute(query_of(folder, rows), np.arange(len(rows)), {"text": "text"})


TEXT = [f"text {number}" for number in range(12)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"continent": ["asia", "europe"] * 6}, "continent"),
        ({"topic": ["a", "b"] * 6, "continent": ["asia", "europe"] * 6}, "topic"),
        ({"topic": ["a", "b"] * 5 + ["a", None]}, None),
        ({"topic": ["a"] * 12}, None),
        ({"topic": [str(number) for number in range(12)]}, None),
        ({"score": ["1", "2"] * 6}, None),
        ({"score": [1, 2] * 6}, None),
        ({"split": ["train", "test"] * 6}, None),
        ({"title": [f"title {number}" for number in range(12)]}, None),
    ],
)
def test_an_attribute_has_few_values_all_words_in_every_row(
    tmp_path: Path, columns: dict[str, list[Any]], expected: str | None
) -> None:
    assert attribute_of(tmp_path, text=TEXT, **columns) == expected


def test_several_columns_that_look_like_attributes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"split.by: several columns may name the parts \(mood, place\); give --by COLUMN"
    ):
        attribute_of(tmp_path, text=TEXT, mood=["good", "bad"] * 6, place=["north", "south"] * 6)


def test_a_column_of_many_values_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spunge.data.arrays.AT_ONCE", 30)
    counts: list[int] = []

    def counted(table: pa.Table, rows: np.ndarray) -> pa.Table:
        counts.append(len(rows))
        return taken(table, rows)

    monkeypatch.setattr("spunge.data.guessing.taken", counted)
    rows = [{"text": f"t{number}", "note": f"n{number}", "topic": "ab"[number % 2]} for number in range(90)]
    query = query_of(tmp_path, rows)
    assert guessed_attribute(query, np.arange(90), {"text": "text"}) == "topic"
    assert counts == [30] * 4  # one piece of the notes, three of the topics
