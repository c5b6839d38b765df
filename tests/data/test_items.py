"""The rows of an evaluation are checked, with row numbers, before anything is trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spunge.data.items import Items, read_items
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe

GOOD = {
    "question": "the capital is",
    "choices": ["paris", "rome"],
    "answer": 0,
    "text": "plain words",
    "topic": "europe",
}


@pytest.fixture
def items_of(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> Callable[..., Items]:
    def run(rows: list[dict[str, Any]], columns: dict[str, str], **entry: Any) -> Items:
        source = str(write_rows("questions.jsonl", rows))
        toy_recipe["evaluate"] = [{"kind": "choices", "source": source, **entry}]
        recipe = load_recipe(toy_recipe)
        return read_items(recipe, recipe.evaluate[0], columns, "evaluate.0")

    return run


CHOICES = {"question": "question", "choices": "choices", "answer": "answer"}


@pytest.mark.parametrize(
    ("change", "columns", "said"),
    [
        ({"question": None}, CHOICES, "evaluate.0.question: 'question' is empty in 1 of 8 rows (first: row 6 of"),
        ({"question": "  "}, CHOICES, "evaluate.0.question: 'question' is empty in 1 of 8 rows (first: row 6 of"),
        ({"choices": None}, CHOICES, "evaluate.0.choices: 'choices' is empty in 1 of 8 rows (first: row 6 of"),
        (
            {"choices": ["paris", None]},
            CHOICES,
            "evaluate.0.choices: 'choices' has an empty entry in 1 of 8 rows (first: row 6",
        ),
        ({"answer": None}, CHOICES, "evaluate.0.answer: 'answer' is empty in 1 of 8 rows (first: row 6 of"),
        (
            {"text": " "},
            {"text": "trim(text)"},
            "evaluate.0.text: 'trim(text)' is empty in 1 of 8 rows (first: row 6 of",
        ),
        ({}, {"text": "answer"}, "evaluate.0.text: 'answer' holds int64, not text"),
        ({}, {"prompt": "answer + 1"}, "evaluate.0.prompt: 'answer + 1' holds int64, not text; as text it is: CAST("),
        ({}, {"question": "qestion"}, "evaluate.0.question: no column 'qestion'; did you mean 'question'?"),
    ],
)
def test_a_gap_or_a_wrong_type_is_refused_with_the_first_row(
    items_of: Callable[..., Items], change: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    rows = [GOOD] * 5 + [{**GOOD, **change}] + [GOOD] * 2
    with pytest.raises(RecipeError) as caught:
        items_of(rows, columns)
    assert str(caught.value).startswith(said), str(caught.value)


def test_the_row_is_that_of_the_file_behind_a_condition(items_of: Callable[..., Items]) -> None:
    rows = [{**GOOD, "topic": "asia"}, GOOD, {**GOOD, "question": None}]
    with pytest.raises(RecipeError, match=r"1 of 2 rows \(first: row 3 of questions\.jsonl\)"):
        items_of(rows, CHOICES, where="topic = 'europe'")
    assert items_of(rows, CHOICES, where="question IS NOT NULL").table.num_rows == 2


def test_an_expression_may_give_an_empty_prompt_on_purpose(items_of: Callable[..., Items]) -> None:
    assert items_of([GOOD], {"prompt": "''"}).table["prompt"].to_pylist() == [""]


def test_the_split_s_attribute_names_the_subjects_only_where_the_rows_have_it(
    items_of: Callable[..., Items], toy_recipe: dict[str, Any]
) -> None:
    assert items_of([GOOD], CHOICES).subjects.keys() == {"europe"}
    assert items_of([{"topics": "x", **{key: GOOD[key] for key in CHOICES}}], CHOICES).subjects.keys() == {"all"}


def test_subjects_spelled_as_numbers_go_by_the_part_s_name(
    items_of: Callable[..., Items], toy_recipe: dict[str, Any]
) -> None:
    toy_recipe["split"] = {"by": "topic", "values": {"one": [1], "two": [2.0]}}
    rows = [{**GOOD, "topic": 1.0}, {**GOOD, "topic": 2}, {**GOOD, "topic": 3}]
    assert items_of(rows, CHOICES).subjects.keys() == {"one", "two", "3.0"}


MIXED = [{**GOOD, "topic": "asia" if row % 10 == 0 else None, "question": f"city {row}"} for row in range(40)]


def test_rows_of_no_part_are_left_out_before_a_limit_is_drawn(items_of: Callable[..., Items]) -> None:
    items = items_of(MIXED, CHOICES, limit=3)
    assert {name: len(own) for name, own in items.subjects.items()} == {"asia": 3}
    assert items.table.num_rows == 3
    assert items.left == 36
    assert str(items.note).startswith("evaluate: 'choices': 36 rows in no part are left out")
    without = items_of([row for row in MIXED if row["topic"]], CHOICES, limit=3)
    assert items.table.drop_columns(["__row__"]) == without.table.drop_columns(["__row__"])
    assert without.note is None


def test_rows_of_no_part_are_measured_under_a_subject_of_their_own(items_of: Callable[..., Items]) -> None:
    assert len(items_of(MIXED, CHOICES, subject="cities").subjects["cities"]) == 40
    assert len(items_of([{**row, "topic": None} for row in MIXED], CHOICES).subjects["all"]) == 40


@pytest.mark.parametrize(("value", "told"), [(None, "'member' is empty in 1 of"), (2, "neither true nor false")])
@pytest.mark.parametrize("topic", ["asia", None])
def test_a_row_that_is_neither_member_nor_non_member_is_refused_also_where_it_is_of_no_part(
    items_of: Callable[..., Items], value: int | None, told: str, topic: str | None
) -> None:
    rows = [
        {**row, "topic": "asia" if at % 20 == 0 else None, "member": int(at % 10 == 0)} for at, row in enumerate(MIXED)
    ]
    rows[7] |= {"topic": topic, "member": value}
    with pytest.raises(RecipeError, match=rf"\.member: .*{told}"):
        items_of(rows, {**CHOICES, "member": "member"})


def test_non_members_count_for_every_part_and_are_in_none(items_of: Callable[..., Items]) -> None:
    """Rows 0 and 20 are members of a part, 10 and 30 members of none."""
    rows = [{**row, "topic": "asia" if at % 20 == 0 else None, "member": at % 10 == 0} for at, row in enumerate(MIXED)]
    items = items_of(rows, {**CHOICES, "member": "member"})
    assert [len(own) for own in items.subjects.values()] == [2 + 36]
    assert (items.table.num_rows, items.left) == (38, 2)


@pytest.mark.parametrize("by", ["topic", {"keywords": {"first": ["old"]}}])
def test_what_a_split_keeps_as_a_part_of_its_own_is_judged_as_that(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], by: Any
) -> None:
    rows = [{**FIRST, "topic": "first"}, SECOND, {**OTHER, "topic": None}]
    toy_recipe["forget"] = {"source": str(write_rows("own.jsonl", rows))}
    toy_recipe["split"] = {"by": by, "unassigned": "keep"} | ({"values": ["first"]} if by == "topic" else {})
    toy_recipe["evaluate"] = [{"kind": "perplexity", "text": "text"}]
    recipe = load_recipe(toy_recipe)
    items = read_items(recipe, recipe.evaluate[0], {"text": "text"}, "evaluate", parts=split_rows(recipe))
    assert {name: own.tolist() for name, own in items.subjects.items()} == {"first": [0], "unassigned": [1, 2]}


FIRST, SECOND, OTHER = (
    {"text": f"paris is {word}", "topic": topic} for word, topic in (("old", "a"), ("new", "b"), ("red", "c"))
)


@pytest.mark.parametrize(
    ("evaluation", "forgotten"),
    [
        ({}, [True, False, False]),  # the very source, with rows that where and values leave out
        ({"where": "topic <> 'a'"}, [False, False]),
        ({"source": "COPY"}, [True, False]),  # another file with some of the texts
        ({"source": "OTHERS"}, None),  # nothing tells what these are about
        ({"text": "'so ' || text"}, [True, False, False]),  # other texts of the same rows
    ],
)
def test_items_know_which_of_them_are_rows_to_forget(
    toy_recipe: dict[str, Any],
    write_rows: Callable[..., Path],
    evaluation: dict[str, Any],
    forgotten: list[bool] | None,
) -> None:
    files = {"COPY": write_rows("copy.jsonl", [FIRST, OTHER]), "OTHERS": write_rows("others.jsonl", [OTHER])}
    if "source" in evaluation:
        evaluation = {**evaluation, "source": str(files[evaluation["source"]])}
    toy_recipe["forget"] = {"source": str(write_rows("own.jsonl", [FIRST, SECOND, OTHER])), "where": "topic <> 'c'"}
    toy_recipe["split"] = {"by": "topic", "values": ["a"]}
    toy_recipe["evaluate"] = [{"kind": "perplexity", "text": "text", **evaluation}]
    recipe = load_recipe(toy_recipe)
    [entry] = recipe.evaluate
    items = read_items(recipe, entry, {"text": evaluation.get("text", "text")}, "evaluate", parts=split_rows(recipe))
    assert (None if items.forgotten is None else items.forgotten.tolist()) == forgotten


@pytest.mark.parametrize(
    ("own", "told"),
    [({}, " (the evaluation names no text of its own, so forget.text is taken)"), ({"text": "body"}, "")],
)
def test_a_column_that_is_forgets_is_told_as_forgets(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], own: dict[str, str], told: str
) -> None:
    source = str(write_rows("other.jsonl", [{"words": "a b c"}]))
    toy_recipe["forget"] = {**toy_recipe["forget"], "text": "text"}
    toy_recipe["evaluate"] = [{"kind": "perplexity", "source": source, "subject": "x", "by": "NULL", **own}]
    recipe = load_recipe(toy_recipe)
    with pytest.raises(RecipeError, match=rf"^evaluate\.0\.text: no column .*words{re.escape(told)}$"):
        read_items(recipe, recipe.evaluate[0], {"text": own.get("text", "text")}, "evaluate.0")
