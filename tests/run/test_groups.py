"""Rows to forget and rows to keep under one name: refused, or remarked on."""

from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import RecipeError
from toys import Told


def evaluated(toy_recipe: dict[str, Any], **entry: Any) -> dict[str, Any]:
    """Of forget's own rows, of which asia alone is to be forgotten."""
    toy_recipe["split"]["values"] = ["asia"]
    toy_recipe["evaluate"] = [{"kind": "perplexity", "text": "text", **entry}]
    return toy_recipe | {"controls": []}


def test_a_subject_of_rows_to_forget_and_to_keep_is_refused_before_any_training(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    told = Told()
    with pytest.raises(
        RecipeError, match=r"evaluate: 12 of the 24 rows of 'both' in 'perplexity' are rows to forget, and .*group"
    ):
        spunge.run(evaluated(toy_recipe, by="'both'"), tmp_path / "run", told)
    assert not any(line.startswith("unlearn") for line in told.lines)


def test_a_subject_of_both_that_says_what_it_is_taken_for_is_measured_and_all_rows_of_both_are_remarked_on(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    told = Told()
    recipe = evaluated(toy_recipe, by="NULL", subject="mixed")
    kept = {**recipe["evaluate"][0], "name": "kept", "by": "'both'", "subject": "both of them", "group": "keep"}
    rest = {**recipe["evaluate"][0], "name": "rest", "where": "topic <> 'asia'", "subject": "rest"}
    recipe["evaluate"] += [kept, rest]
    results = spunge.run(recipe, tmp_path / "run", told)
    [remark] = [line for line in told.lines if "no way is good on them together" in line]
    assert remark.startswith("evaluate: 12 of the 24 rows of 'mixed' in 'perplexity'")
    wanted = {row.subject: (row.group, row.wanted) for row in results.rows if row.stage == "merged"}
    assert wanted == {
        "mixed": ("together", None),
        "both": ("keep", "down"),
        "both of them": ("keep", "down"),
        "rest": ("keep", "down"),
    }
