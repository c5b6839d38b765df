"""Reading and splitting rows: sources, conditions, attributes, and what was dropped and why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spunge.data.query import Query
from spunge.data.rows import Records
from spunge.data.samples import table_sha256
from spunge.data.selection import select_rows
from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe

ROWS = [
    {"text": "one", "topic": "a", "groups": ["x", "y"], "score": 1.0, "flag": True},
    {"text": "two", "topic": "a", "groups": ["y"], "score": 4.0, "flag": False},
    {"text": "three", "topic": "b", "groups": [], "score": 5.0, "flag": True},
    {"text": "four", "topic": None, "groups": None, "score": 3.0, "flag": True},
    {"text": "five", "topic": "", "groups": ["y", "y"], "score": 2.0, "flag": None},
]


@pytest.fixture
def split(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> Callable[..., Parts]:
    toy_recipe["forget"]["source"] = str(write_rows("rows.jsonl", ROWS))

    def run(*overrides: str) -> Parts:
        return split_rows(load_recipe(toy_recipe, overrides))

    return run


def sizes(parts: Parts) -> dict[str, int]:
    return {part.value: part.rows for part in parts.parts}


def refused(split: Callable[..., Parts], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        split(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_null_and_empty_values_are_in_no_part(split: Callable[..., Parts]) -> None:
    parts = split()
    assert sizes(parts) == {"a": 2, "b": 1}
    assert parts.unassigned == 2
    assert parts.parts[0].samples.table["text"].to_pylist() == ["one", "two"]


def test_a_list_puts_a_row_into_each_of_its_parts_once(split: Callable[..., Parts]) -> None:
    parts = split("split.by=groups")
    assert sizes(parts) == {"x": 1, "y": 3}
    assert parts.unassigned == 2


def test_the_attribute_may_be_an_sql_expression(split: Callable[..., Parts]) -> None:
    assert sizes(split("split.by=CASE WHEN score > 2.5 THEN 'high' ELSE 'low' END")) == {"high": 3, "low": 2}
    assert sizes(split("split.by=flag")) == {"false": 1, "true": 3}
    assert sizes(split("split.by=flag", "split.values=[true]")) == {"true": 3}
    assert sizes(split("split.by=score", "split.values=[4.0, 5.0]")) == {"4.0": 1, "5.0": 1}


def test_spellings_are_gathered_under_one_name_and_the_rest_is_reported(split: Callable[..., Parts]) -> None:
    parts = split("split.values={letters: [a, b]}")
    assert sizes(parts) == {"letters": 3}
    parts = split("split.values=[b]")
    assert sizes(parts) == {"b": 1}
    assert parts.dropped == {"a": "2 rows, not in split.values"}
    assert parts.unassigned == 4


def test_small_parts_are_dropped_with_the_reason(split: Callable[..., Parts]) -> None:
    parts = split("split.min_rows=2")
    assert sizes(parts) == {"a": 2}
    assert "fewer than split.min_rows" in parts.dropped["b"]
    assert "no part is left" in refused(split, "split.min_rows=9")


def test_unassigned_rows_may_be_a_part_or_an_error(split: Callable[..., Parts]) -> None:
    assert sizes(split("split.unassigned=keep")) == {"a": 2, "b": 1, "unassigned": 2}
    assert "2 rows are in no part" in refused(split, "split.unassigned=error")


def test_where_filters_before_the_split(split: Callable[..., Parts]) -> None:
    parts = split("forget.where=score >= 4")
    assert sizes(parts) == {"a": 1, "b": 1}
    assert parts.filtered == 3


def test_a_limit_draws_the_same_rows_for_the_same_seed(split: Callable[..., Parts]) -> None:
    first, second = split("forget.limit=1").parts[0], split("forget.limit=1").parts[0]
    assert first.rows == 2
    assert len(first.samples) == 1
    assert first.samples.sha256 == second.samples.sha256


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["forget.where=scoer > 1"], ["forget.where", "scoer", "did you mean 'score'?"]),
        (["forget.where=score >"], ["forget.where", "no SQL expression"]),
        (["forget.where=true); SELECT (1"], ["forget.where", "more than one"]),
        (["forget.where=score > 99"], ["forget.where", "no row of 5"]),
        (["split.by=tpoic"], ["split.by", "did you mean 'topic'?"]),
        (["split.values=[c]"], ["split.values", "no row has 'c'"]),
        (["forget.text=txt"], ["forget.text", "no column 'txt'", "did you mean 'text'?"]),
        (["forget.text=score"], ["forget.text", "not text"]),
        (["forget.source=/nowhere/x.jsonl"], ["forget.source", "no such file"]),
        (
            ["forget.where=text IN (SELECT content FROM read_text('/etc/hostname'))"],
            ["forget.where", "asks for the table read_text()"],
        ),
        (["forget.where=EXISTS (FROM 'https://example.org/x.csv')"], ["forget.where"]),
        (["forget.where=EXISTS (FROM table)"], ["forget.where"]),
    ],
)
def test_a_wrong_source_condition_or_column_is_named(
    split: Callable[..., Parts], overrides: list[str], said: list[str]
) -> None:
    message = refused(split, *overrides)
    for part in said:
        assert part in message, message


@pytest.mark.parametrize(
    ("pairs", "chat", "remarks"),
    [
        ([("the Sun?", "Mercury"), ("of gold?", "Au")], None, 1),
        ([("Q: one\nA:", "1"), ("", "2"), ("Q: two\nA:", "2")], None, 1),  # rows without a prompt are left out
        ([("the Sun?", "Mercury")], True, 0),
        ([("the Sun? ", "Mercury")], None, 0),
        ([("the Sun?", " Mercury")], None, 0),
        ([("the Sun?\n", "Mercury")], None, 0),
        ([("the Sun?", "Mercury"), ("of gold? ", "Au")], None, 0),
        ([("最大的行星？", "木星")], None, 0),
        ([([{"role": "user", "content": "a?"}], [{"role": "assistant", "content": "b"}])], None, 0),
    ],
)
def test_words_that_touch_between_prompt_and_completion_in_every_row_are_remarked_on(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], pairs: list[Any], chat: bool | None, remarks: int
) -> None:
    content = [{"prompt": prompt, "completion": completion, "topic": "a"} for prompt, completion in pairs]
    source = str(write_rows("pairs.jsonl", content))
    toy_recipe["forget"] = {"source": source, "prompt": "prompt", "completion": "completion", "chat": chat}
    parts = split_rows(load_recipe(toy_recipe))
    told = [note for note in parts.notes if "white space between prompt and completion" in note]
    assert len(told) == remarks
    if told:
        [sample] = parts.parts[0].samples.texts([0], None)
        assert repr(sample.prompt[-4:] + sample.completion[:2])[1:-1] in told[0]


def test_rows_with_an_empty_text_are_left_out_and_counted_by_part(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    content = [
        {"text": "fine", "topic": "a"},
        {"text": " \t\u00a0", "topic": "a"},
        {"text": None, "topic": "a"},
        {"text": "good", "topic": "b"},
    ]
    toy_recipe["forget"]["source"] = str(write_rows("rows.jsonl", content))
    parts = split_rows(load_recipe(toy_recipe))
    assert [(part.value, part.rows, part.empty, len(part.samples)) for part in parts.parts] == [
        ("a", 3, 2, 1),
        ("b", 1, 0, 1),
    ]
    assert parts.notes == ("part 'a': 2 of 3 rows are left out, empty in text (first: row 2 of rows.jsonl)",)
    assert parts.to_json()["parts"][0]["empty"] == 2


@pytest.mark.parametrize("blank", [None, "", " "])
@pytest.mark.parametrize("role", ["prompt", "completion"])
def test_an_empty_prompt_or_completion_is_never_drawn(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], role: str, blank: str | None
) -> None:
    content = [{"topic": "a", "prompt": f"ask {n}", "completion": f"tell {n}"} for n in range(4)]
    content[2][role] = blank  # type: ignore[assignment]
    toy_recipe["forget"] = {
        "source": str(write_rows("rows.jsonl", content)),
        "prompt": "prompt",
        "completion": "completion",
        "limit": 3,
    }
    (part,) = split_rows(load_recipe(toy_recipe)).parts
    assert part.samples.table["prompt"].to_pylist() == ["ask 0", "ask 1", "ask 3"]


def test_a_part_without_any_text_is_refused_by_name(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    content = [{"text": "fine", "topic": "a"}, {"text": "  ", "topic": "b"}, {"text": None, "topic": "b"}]
    toy_recipe["forget"]["source"] = str(write_rows("rows.jsonl", content))
    with pytest.raises(RecipeError, match=r"part 'b' has no text: all of its 2 rows.*row 2 of rows\.jsonl"):
        split_rows(load_recipe(toy_recipe))
    assert sizes(split_rows(load_recipe(toy_recipe, ["split.values=[a]"]))) == {"a": 1}
    content.append({"text": "one", "topic": "b"})
    toy_recipe["forget"]["source"] = str(write_rows("rows.jsonl", content))
    with pytest.raises(RecipeError, match=r"'b': 1 rows with text, fewer than split\.min_rows"):
        split_rows(load_recipe(toy_recipe, ["split.min_rows=2"]))


def test_retain_takes_source_and_columns_from_forget_unless_it_has_its_own(
    split: Callable[..., Parts], toy_recipe: dict[str, Any]
) -> None:
    toy_recipe["retain"] = {"where": "score < 3"}
    recipe = load_recipe(toy_recipe)
    assert recipe.retain is not None
    assert select_rows(recipe.retain, recipe, "retain").samples.table["text"].to_pylist() == ["one", "five"]


def test_equal_rows_have_equal_hashes_whatever_table_they_came_from() -> None:
    whole = pa.table({"text": ["a", "b", "c", "d"]})
    chunked = pa.chunked_array([["x", "b"], ["c"]])
    assert table_sha256(whole.slice(1, 2)) == table_sha256(pa.table({"text": ["b", "c"]}))
    assert table_sha256(pa.table({"text": chunked}).slice(1)) == table_sha256(pa.table({"text": ["b", "c"]}))
    assert table_sha256(whole) != table_sha256(pa.table({"text": ["a", "b", "cd", ""]}))


def test_conditions_see_no_python_variables() -> None:
    table = pa.table({"text": ["a"]})
    with pytest.raises(RecipeError, match=r"does not exist|asks for the table"):
        Query(Records(table)).where("EXISTS (FROM table_of_mine)", "forget.where")
    table_of_mine = table
    with pytest.raises(RecipeError, match=r"does not exist|asks for the table"):
        Query(Records(table)).where("EXISTS (FROM table_of_mine)", "forget.where")
    assert table_of_mine.num_rows == 1


def test_real_groups_come_out_of_a_list_column(shared: Path, toy_recipe: dict[str, Any]) -> None:
    """Counted independently with plain Python."""
    file = shared / "toxigen_human.jsonl"
    toy_recipe["forget"] = {"source": str(file), "where": "toxicity_human >= 3"}
    toy_recipe["split"] = {"by": "target_groups", "values": ["women", "muslim"]}
    parts = split_rows(load_recipe(toy_recipe))
    rows = [json.loads(line) for line in file.open()]
    expected = {
        group: sum(row["toxicity_human"] >= 3 and group in row["target_groups"] for row in rows)
        for group in ("women", "muslim")
    }
    assert sizes(parts) == expected


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "messages: messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "messages: conversations"),
        ({"instruction": "q", "input": "", "output": "a"}, "prompt: instruction and completion: output"),
        ({"question": "q", "answer": "a"}, "prompt: question and completion: answer"),
        ({"content": "t"}, "text: content"),
    ],
)
def test_rows_without_a_column_text_are_told_the_columns_that_they_seem_to_have(
    write_rows: Callable[..., Path], row: dict[str, Any], named: str
) -> None:
    forget = {"source": str(write_rows("rows.jsonl", [row]))}
    with pytest.raises(
        RecipeError, match=f"forget: the rows have no column 'text'; name theirs, such as forget.{named}$"
    ):
        split_rows(load_recipe({"model": {"path": "m"}, "forget": forget, "unlearn": {"method": "tvn"}}))


@pytest.mark.parametrize("values", [None, [1, 2]])
def test_what_is_not_a_number_is_no_value_of_a_column_of_numbers(tmp_path: Path, values: list[int] | None) -> None:
    table = pa.table({"text": ["a", "b", "c", "d"], "score": pa.array([1.0, 2.0, float("nan"), None])})
    pq.write_table(table, tmp_path / "rows.parquet")
    split = {"by": "score"} | ({"values": values} if values else {})
    recipe = {"model": {"path": "m"}, "forget": {"source": str(tmp_path / "rows.parquet")}, "split": split}
    parts = split_rows(load_recipe({**recipe, "unlearn": {"method": "tvn"}}))
    assert ([part.rows for part in parts.parts], parts.unassigned) == ([1, 1], 2)


def test_a_heading_with_spaces_around_is_named_without_them(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text , topic\nhello,a\n")
    recipe = {"model": {"path": "m"}, "forget": {"source": str(tmp_path / "rows.csv")}, "split": {"by": "topic"}}
    parts = split_rows(load_recipe({**recipe, "unlearn": {"method": "tvn"}}))
    assert [(part.value, part.rows) for part in parts.parts] == [("a", 1)]


@pytest.mark.parametrize("kind", ["text", "pairs", "conversations"])
def test_samples_that_are_made_a_few_at_a_time_and_kept_in_a_file_are_those_that_are_made_at_once(
    toy_recipe: dict[str, Any],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
) -> None:
    asks = [{"role": "user", "content": "ask"}]
    rows = [
        {
            "text": f"words {number}",
            "refusal": f"no {number}",
            "prompt": f"ask {number}",
            "completion": f"tell {number}",
            "messages": [*asks, {"role": "assistant", "content": f"tell {number}"}],
            "topic": "ab"[number % 2],
        }
        for number in range(23)
    ]
    columns = {
        "text": {"text": "text"},
        "pairs": {"prompt": "prompt", "completion": "completion", "refusal": "refusal"},
        "conversations": {"messages": "messages"},
    }
    toy_recipe["forget"] = {"source": str(write_rows("mine.jsonl", rows)), "limit": 8, **columns[kind]}
    recipe = load_recipe(toy_recipe)
    at_once = split_rows(recipe).parts
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("spunge.data.split.AT_ONCE", 3)
    monkeypatch.setattr("spunge.data.keeping.IN_MEMORY", 0)
    few = split_rows(recipe).parts
    assert len(few) == 2
    for one, other in zip(at_once, few, strict=True):
        assert one.samples.table.equals(other.samples.table)
        assert one.samples.sha256 == other.samples.sha256
        assert other.samples.table.column(0).num_chunks == 3
    left = [file.name for file in (tmp_path / "cache").rglob("*.arrow*")]
    assert not [name for name in left if name.startswith(f"{os.getpid()}-")]
