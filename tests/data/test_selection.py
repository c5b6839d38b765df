"""The retain rows beside the forget rows: none of them, some, or all are both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spunge.data.selection import Selection, select_retain, split_content
from spunge.data.split import split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.registry import METHODS

FORGET = [{"text": f"words {number}", "topic": "ab"[number % 2], "bad": f"bad {number}"} for number in range(6)]
PAIRS = [{"prompt": f"ask {number}", "completion": f"tell {number}", "topic": "a"} for number in range(6)]
CHATS = [
    {"messages": [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "no"}]}
    for number in range(3)
]


@pytest.fixture
def select(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> Callable[..., Selection | None]:
    def run(rows: list[dict[str, Any]], own: list[dict[str, Any]] | None, **blocks: Any) -> Selection | None:
        toy_recipe["forget"] = {"source": str(write_rows("forget.jsonl", rows)), **blocks.get("forget", {})}
        source = {} if own is None else {"source": str(write_rows("retain.jsonl", own))}
        toy_recipe["retain"] = {**source, **blocks.get("retain", {})}
        toy_recipe["split"] = blocks.get("split")
        recipe = load_recipe(toy_recipe)
        return select_retain(recipe, split_rows(recipe))

    return run


PAIR = {"prompt": "prompt", "completion": "completion"}
CHAT = {"messages": "messages"}


@pytest.mark.parametrize(("rows", "columns"), [(FORGET, {}), (PAIRS, PAIR), (CHATS, CHAT)])
def test_retain_rows_that_are_the_rows_to_forget_are_refused(
    select: Callable[..., Selection | None], rows: list[dict[str, Any]], columns: dict[str, str]
) -> None:
    said = r"retain: it is every row of forget's source.*retain: neutral"
    with pytest.raises(RecipeError, match=said):
        select(rows, None, forget=columns)
    with pytest.raises(
        RecipeError, match=r"retain: all of its \d rows are rows to forget too \(first: row 1 of retain\.jsonl\)"
    ):
        select(rows, rows[::-1], forget=columns)
    with pytest.raises(RecipeError, match="all of its 2 rows"):
        select(rows, [*rows[:2], dict.fromkeys(rows[0])], forget=columns)


def test_some_shared_rows_are_counted_with_the_first(select: Callable[..., Selection | None]) -> None:
    selection = select(FORGET, [{"text": "mine"}, *FORGET[2:4]])
    assert selection is not None
    assert selection.notes == ("retain: 2 of 3 rows are rows to forget too (first: row 2 of retain.jsonl)",)
    assert not select(FORGET, [{"text": "mine"}, {"text": "words 1 "}]).notes  # type: ignore[union-attr]


def test_the_forget_source_with_a_condition_or_other_columns_is_a_retain_set(
    select: Callable[..., Selection | None],
) -> None:
    selection = select(FORGET, None, forget={"where": "topic = 'a'"}, retain={"where": "topic = 'b'"})
    assert selection is not None
    assert selection.samples.table["text"].to_pylist() == ["words 1", "words 3", "words 5"]
    assert select(FORGET, None, forget={"text": "bad"}, retain={"text": "text"}) is not None
    with pytest.raises(RecipeError, match="those to forget among them"):
        select(FORGET, None, forget={"where": "topic = 'a'"})


def test_empty_retain_rows_are_left_out_and_counted_and_some_must_be_left(
    select: Callable[..., Selection | None],
) -> None:
    selection = select(FORGET, [{"text": "mine"}, {"text": " "}, {"text": None}])
    assert selection is not None
    assert selection.samples.table["text"].to_pylist() == ["mine"]
    assert selection.empty == 2
    assert "2 of 3 rows are left out, empty in text (first: row 2 of retain.jsonl)" in selection.notes[0]
    with pytest.raises(RecipeError, match=r"retain: no row with text is left; .*row 1 of retain\.jsonl"):
        select(FORGET, [{"text": ""}])


def test_neutral_rows_serve_beside_any_form_of_forget_rows(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    toy_recipe["forget"] = {"source": str(write_rows("forget.jsonl", PAIRS)), **PAIR}
    for retain in ("neutral", {"source": "neutral"}, {"source": ["neutral"], "text": "text", "limit": 9}):
        recipe = load_recipe({**toy_recipe, "retain": retain})
        selection = select_retain(recipe, split_rows(recipe))
        assert selection is not None
        assert selection.samples.plain
        assert len(selection.samples) == (300 if not isinstance(retain, dict) or "limit" not in retain else 9)


def test_a_file_called_neutral_is_that_file(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neutral").mkdir()
    (tmp_path / "neutral" / "own.jsonl").write_text('{"text": "mine"}\n')
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe({**toy_recipe, "retain": {"source": "neutral"}})
    selection = select_retain(recipe, split_rows(recipe))
    assert selection is not None
    assert selection.samples.table["text"].to_pylist() == ["mine"]


def test_what_split_json_holds(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> None:
    toy_recipe["retain"] = {"source": str(write_rows("retain.jsonl", [{"text": "mine"}, {"text": ""}]))}
    recipe = load_recipe(toy_recipe)
    parts = split_rows(recipe)
    selection = select_retain(recipe, parts)
    assert selection is not None
    content = split_content(parts, selection)
    assert content["retain"] == {"selected": 1, "empty": 1, "sha256": selection.samples.sha256}
    assert content["notes"] == ["retain: 1 of 2 rows are left out, empty in text (first: row 2 of retain.jsonl)"]
    assert split_content(parts, None).keys() == content.keys() - {"retain"}


@pytest.mark.parametrize(("method", "way"), [("rmu", "retain: neutral"), ("npo", "set unlearn.alpha to 0")])
def test_a_missing_retain_set_is_refused_with_the_ways_out(toy_recipe: dict[str, Any], method: str, way: str) -> None:
    del toy_recipe["retain"]
    toy_recipe["unlearn"] = {"method": method}
    with pytest.raises(RecipeError, match=r"retain: missing, and unlearn\.method .* needs it") as caught:
        load_recipe(toy_recipe)
    for said in (way, "`retain: neutral`", "such as tvn or ga"):
        assert said in str(caught.value)
    for free in ({"method": "tvn"}, {"method": "ga"}, {"method": "npo", "alpha": 0}):
        assert load_recipe({**toy_recipe, "unlearn": free}).retain is None
    assert METHODS.names()
