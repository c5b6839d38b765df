"""Parts by words: which patterns are found, in what, and that a bad one is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.data.split import Parts, split_rows
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from toys import texts

PATTERNS = {"women": [r"\bwom[ae]n\b", "girls?"], "age": ["old people"]}
ROWS = ["Women talk", "a womanly girl", "OLD  people", "old people and women", "nobody", "", "a woman"]


def parts_of(folder: Path, rows: list[dict[str, Any]], split: dict[str, Any], **forget: Any) -> Parts:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forget = {"source": str(folder / "rows.jsonl"), **forget}
    return split_rows(
        load_recipe({"model": {"path": "m"}, "forget": forget, "split": split, "unlearn": {"method": "tvn"}})
    )


def test_a_row_is_in_every_part_whose_pattern_is_found_and_else_unassigned(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, [{"text": text} for text in ROWS], {"by": {"keywords": PATTERNS}})
    assert {part.value: part.samples.table["text"].to_pylist() for part in parts.parts} == {
        "age": ["old people and women"],
        "women": ["Women talk", "a womanly girl", "old people and women", "a woman"],
    }
    assert (parts.attribute, parts.unassigned) == ("keywords", 3)


@pytest.mark.parametrize(
    ("row", "forget"),
    [
        ({"q": "who?", "a": "the girls"}, {"prompt": "q", "completion": "a"}),
        ({"m": [{"role": "user", "content": "girl?"}, {"role": "assistant", "content": "no"}]}, {"messages": "m"}),
    ],
)
def test_all_that_a_row_says_is_searched(tmp_path: Path, row: dict[str, Any], forget: dict[str, str]) -> None:
    parts = parts_of(tmp_path, [row], {"by": {"keywords": PATTERNS}}, **forget)
    assert [part.value for part in parts.parts] == ["women"]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"a": ["("]}, r"split.by.keywords.a: '\(' is no regular expression"),
        ({"a": [".*"]}, r"split.by.keywords.a: '\.\*' is found in an empty text"),
        ({"a": ["(a|a)+$"]}, r"split.by.keywords.a: .* was not done with a text of 41 characters after 0.05 s"),
        ({"a": []}, "split.by.keywords.a"),
        ({}, "split.by.keywords"),
    ],
)
def test_a_pattern_that_is_none_or_never_ends_is_refused(
    tmp_path: Path, patterns: dict[str, list[str]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spunge.data.patterns.SECONDS", 0.05)
    with pytest.raises(RecipeError, match=said):
        parts_of(tmp_path, [{"text": 40 * "a" + "b"}], {"by": {"keywords": patterns}})


def test_forget_rows_are_judged_by_their_parts_and_other_rows_by_none(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{text} {word}"} for word in ("river", "mountain") for text in texts(word, 4)]
    source, other = str(write_rows("own.jsonl", rows)), str(write_rows("other.jsonl", rows[:3]))
    recipe = {
        **toy_recipe,
        "forget": {"source": source},
        "split": {"by": {"keywords": {"wet": ["river"], "high": ["mountain"]}}, "unassigned": "error"},
        "controls": [],
        "evaluate": [
            {"kind": "perplexity"},
            {"kind": "perplexity", "name": "others", "source": other, "subject": "elsewhere"},
        ],
    }
    results = spunge.run(load_recipe(recipe), tmp_path / "run")
    assert {row.subject for row in results.rows} == {"wet", "high", "elsewhere"}
    changed = load_recipe({**recipe, "split": {"by": {"keywords": {"wet": ["mountain"], "high": ["river"]}}}})
    with pytest.raises(RecipeError, match=r"--out: .* was made by another recipe: split.by was "):
        spunge.run(changed, tmp_path / "run")
