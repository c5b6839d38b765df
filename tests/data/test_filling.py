"""Templates of the user's: a text with columns in braces, wherever a recipe names a column."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spunge.data.query import Query
from spunge.data.rows import Records
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe


@pytest.fixture(scope="module")
def query() -> Query:
    columns = {
        "question": ["who", "it's 'so'", "", None, "  "],
        "bad answer": ["a", "b", "c", "d", "e"],
        "n": [1, 2, 3, 4, 5],
        "many": [["x"], ["y"], [], None, ["z"]],
    }
    return Query(Records(pa.table(columns)))


@pytest.mark.parametrize(
    ("template", "first"),
    [
        ("### Question: {question}\n### Answer:", "### Question: who\n### Answer:"),
        ("{question}? {bad answer}.", "who? a."),
        ("{question}", "who"),
        ("{n}. It's {Question}, isn't it", "1. It's who, isn't it"),
        ("{{{question}}} {{question}} '", "{who} {question} '"),
    ],
)
def test_a_template_is_filled_as_python_fills_it(query: Query, template: str, first: str) -> None:
    assert query.project({"prompt": template}, "forget.")["prompt"].to_pylist()[0] == first
    assert first == template.format(**{"question": "who", "Question": "who", "bad answer": "a", "n": 1})


def test_a_row_whose_column_is_empty_gives_no_text(query: Query) -> None:
    filled = query.project({"prompt": "Q: {question} A:"}, "forget.")["prompt"].to_pylist()
    assert filled == ["Q: who A:", "Q: it's 'so' A:", None, None, None]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "Q: {questoin} A:",
            r"forget.prompt: the template's {questoin} is no column; did you mean 'question'\?.*doubled",
        ),
        ("Q: {question} {", "forget.prompt: the braces of the template .* do not match; .* doubled"),
        ("Q: {question} }", "do not match"),
        ("Q: {question!r} {question}", "a column's name, and nothing else"),
        ("Q: {question} {}", "a column's name, and nothing else"),
        ("Q: {many} A:", "{many} is a list or a mapping"),
        ("'Q: {question}'", "is SQL, and {question} in its quotes is a plain text; write the template without"),
        ("'Q: {question}' || question", "in its quotes is a plain text"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(query: Query, template: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        query.project({"prompt": template}, "forget.")


@pytest.mark.parametrize("expression", ["{'a': question}.a", "'{x}' || question", "CAST({'n': n}.n AS VARCHAR)"])
def test_sql_with_braces_stays_sql(query: Query, expression: str) -> None:
    assert query.project({"prompt": expression}, "forget.").num_rows == 5


def test_rows_are_put_to_the_model_by_their_template(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    content = [{"topic": "ab"[n % 2], "q": f"who {n}", "a": f"me {n}"} for n in range(4)] + [
        {"topic": "a", "q": "", "a": "x"}
    ]
    file = str(write_rows("rows.jsonl", content))
    toy_recipe |= {
        "forget": {"source": file, "prompt": "### Question: {q}\n### Answer:", "completion": " {a}."},
        "split": {"by": "topic"},
        "evaluate": [],
    }
    [first, _] = split_rows(load_recipe(toy_recipe)).parts
    texts = first.samples.table
    assert texts["prompt"].to_pylist() == ["### Question: who 0\n### Answer:", "### Question: who 2\n### Answer:"]
    assert texts["completion"].to_pylist() == [" me 0.", " me 2."]
