"""One rule for columns: the name of an existing column is that column, whatever it looks like; anything else is SQL."""

import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spunge.data import query as query_module
from spunge.data.items import read_items
from spunge.data.query import Query
from spunge.data.rows import Records
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe

# SQL's words, its functions, its literals, and signs that mean something in SQL or in paths.
NAMES = [
    *"group order end select user rows value text __row__ NULL true 1st 42 'x' a.b count(*) score>3 -- ; % Überschrift".split(),
    "target group",
    "bad answer",
    'say "x"',
    '"',
    "a  b",
    " lead",
    "trail ",
    "",
    "new\nline",
    "current_date",
    "rowid",
    "x" * 300,
]


def query_of(**columns: list[Any]) -> Query:
    return Query(Records(pa.table(columns)))


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_column_is_that_column(name: str) -> None:
    query = Query(Records(pa.table({"other": ["p", "q"], name: ["x", "y"], "score": [1, 2]})))
    assert query.column(name) == name
    assert query.has(name)
    assert query.values(name, "split.by")["value"].to_pylist() == ["x", "y"]
    assert query.project({"text": name}, "forget.")["text"].to_pylist() == ["x", "y"]
    assert query.where("score = 2", "forget.where").tolist() == [1], "the other columns stay within SQL's reach"


@pytest.mark.parametrize("name", ["group", "bad answer", "a.b", 'say "x"', "Überschrift"])
def test_every_setting_that_names_a_column_keeps_the_rule(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], name: str
) -> None:
    content = [{"n": number, name: f"{'ab'[number % 2]} {number // 2}"} for number in range(4)]
    file = str(write_rows("rows.jsonl", content))
    toy_recipe |= {"forget": {"source": file, "text": name}, "split": {"by": name}, "evaluate": []}
    parts = split_rows(load_recipe(toy_recipe))
    assert parts.attribute == name
    assert [part.samples.table["text"].to_pylist() for part in parts.parts] == [["a 0"], ["a 1"], ["b 0"], ["b 1"]]
    toy_recipe["evaluate"] = [{"kind": "perplexity", "text": name, "by": name, "source": file}]
    recipe = load_recipe(toy_recipe)
    items = read_items(recipe, recipe.evaluate[0], {"text": name}, "evaluate.0")
    assert items.subjects.keys() == {"a 0", "a 1", "b 0", "b 1"}


def test_a_name_in_sql_s_double_quotes_is_shown_as_the_column_is_called(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    toy_recipe["forget"]["source"] = str(write_rows("rows.jsonl", [{"group": "a", "text": "one"}]))
    assert split_rows(load_recipe(toy_recipe, ["split.by='\"group\"'"])).attribute == "group"


def test_one_word_is_a_column_whatever_its_case_and_never_a_word_of_sql() -> None:
    query = query_of(Topic=["a"], text=["b"])
    assert query.column("topic") == "Topic"
    for word in ("user", "rows", "current_date", "topics"):
        assert not query.has(word)
        with pytest.raises(RecipeError, match=rf"split\.by: no column '{word}'"):
            query.values(word, "split.by")
    assert query.values("NULL", "evaluate.by")["value"].to_pylist() == [None]


def test_a_column_in_single_quotes_is_refused_as_the_text_it_is() -> None:
    with pytest.raises(
        RecipeError, match="'bad answer' is a text in SQL; the column is named without quotes: bad answer"
    ):
        query_of(**{"bad answer": ["a"]}).values("'bad answer'", "split.by")


def test_two_unicode_forms_of_a_name_are_one_column() -> None:
    assert Query(Records(pa.table({"U\u0308ber": ["a"], "x": ["b"]}))).column("\u00dcber") == "U\u0308ber"


def test_columns_that_differ_by_case_alone_are_told_apart_by_name_and_refused_in_sql() -> None:
    query = query_of(A=["x"], a=["y"])
    assert [query.values(name, "split.by")["value"].to_pylist() for name in ("A", "a")] == [["x"], ["y"]]
    with pytest.raises(RecipeError, match="SQL does not tell 'A' from 'a'; rename one"):
        query.values("upper(a)", "split.by")
    with pytest.raises(RecipeError, match="rename one"):
        query.where("a = 'x'", "forget.where")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("grup", "no column 'grup'; did you mean 'group'?"),
        ("bad answers", "did you mean 'bad answer'?"),
        ("upper(group)", "write the column 'group' in double quotes"),
        ("bad answer || 'x'", "write the column 'bad answer' in double quotes"),
        ("upper(topik)", "did you mean 'topic'?"),
        ("score >= 2", "CAST(name AS DOUBLE)"),
        ("topic), (1", "more than one expression"),
        ("1); SELECT (2", "more than one expression"),
    ],
)
def test_what_is_neither_names_the_nearest_thing_that_works(given: str, said: str) -> None:
    query = query_of(group=["a"], topic=["b"], score=["3"], **{"bad answer": ["c"]})
    with pytest.raises(RecipeError) as caught:
        query.values(given, "split.by")
    assert str(caught.value).startswith("split.by: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["user", "CURRENT_USER", "session_user"])
def test_a_condition_on_a_column_that_is_not_there_does_not_ask_for_the_session_s_user(word: str) -> None:
    query = query_of(name=["a", "b"])
    with pytest.raises(RecipeError, match=f"no column '{word.lower()}'"):
        query.where(f"{word} <> 'bot'", "forget.where")
    assert query_of(user=["a", "bot"]).where("user <> 'bot'", "forget.where").tolist() == [0]
    assert query.where("name <> 'user'", "forget.where").tolist() == [0, 1]


def test_a_value_stays_as_it_is_written_and_blank_ones_are_missing() -> None:
    query = query_of(
        v=[" a", "a ", "", " \t", "\u00a0", None], w=[[" a", "a"], ["x", "x"], [], None, ["", "y"], [None]]
    )
    assert query.values("v", "split.by")["value"].to_pylist() == [" a", "a ", None, None, None, None]
    lines = query.values("w", "split.by").to_pylist()
    got = {number: {line["value"] for line in lines if line["__row__"] == number} for number in range(6)}
    assert got == {0: {" a", "a"}, 1: {"x"}, 2: {None}, 3: {None}, 4: {None, "y"}, 5: {None}}


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([7]), "7"),
        (pa.array([7.0]), "7.0"),
        (pa.array([2**63], pa.uint64()), "9223372036854775808"),
        (pa.array([Decimal("1.50")]), "1.50"),
        (pa.array([True]), "true"),
        (pa.array([datetime.date(2024, 1, 5)]), "2024-01-05"),
        (pa.array([datetime.datetime(2024, 1, 5, 10)]), "2024-01-05 10:00:00"),
        (pa.array([datetime.datetime(2024, 1, 5, 10)], pa.timestamp("us", "UTC")), "2024-01-05 10:00:00+00"),
        (pa.array(["007"]), "007"),
    ],
)
def test_values_of_every_type_have_the_text_that_a_person_would_write(
    column: pa.Array, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    assert Query(Records(pa.table({"v": column}))).values("v", "split.by")["value"].to_pylist() == [text]


def test_an_expression_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "SECONDS", 0.2)
    query = Query(Records(pa.table({"n": np.arange(1000)})))
    with pytest.raises(RecipeError, match=r"forget\.where: .* was stopped after"):
        query.where("n = (SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b)", "forget.where")


@pytest.mark.parametrize("given", ["random() < 0.5", "topic || uuid()", "RANDOM( ) > 0.1", "now() > '2020-01-01'"])
def test_an_expression_that_gives_other_values_each_time_is_refused(given: str) -> None:
    query = query_of(topic=["a", "b"])
    for asked in (lambda: query.where(given, "forget.where"), lambda: query.values(given, "split.by")):
        with pytest.raises(RecipeError, match="gives other values each time, by "):
            asked()


def test_the_name_of_a_function_in_a_text_or_of_a_column_is_none() -> None:
    query = query_of(topic=["random()", "b"], random=["x", "y"])
    assert query.where("topic = 'random()' AND random = 'x'", "forget.where").tolist() == [0]


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        ('topic = "a"', "a text stands in single quotes: 'a'; columns: topic, group"),
        ("group = 'a'", "write the column 'group' in double quotes: \"group\""),
        ("", "an empty condition; leave it out"),
    ],
)
def test_a_slip_in_a_condition_is_told_with_its_mend(condition: str, wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        query_of(topic=["a"], group=["b"]).where(condition, "forget.where")
    assert str(caught.value).endswith(wanted)


def test_a_syntax_error_does_not_blame_a_plain_column() -> None:
    with pytest.raises(RecipeError) as caught:
        query_of(topic=["a"]).where("topic = 'a' and", "forget.where")
    assert "double quotes" not in str(caught.value)
