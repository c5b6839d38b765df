"""Rows and models to compare with that the model knows: refused in one line before anything is trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import RecipeError
from toys import Told, rows


def refused(recipe: dict[str, Any], folder: Path, message: str) -> None:
    told = Told()
    with pytest.raises(RecipeError, match=message) as raised:
        spunge.run(recipe, folder / "run", told)
    assert "\n" not in str(raised.value)
    assert not any(line.startswith(("unlearn", "teach the")) for line in told.lines)


def test_unseen_rows_of_the_audit_that_are_to_be_forgotten_are_refused(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    audit = {
        "kind": "audit",
        "attack": "membership",
        "source": toy_recipe["forget"]["source"],
        "where": "topic = 'asia'",
    }
    message = r"12 rows \(first: row \d+\) of 'membership', which the model must not have seen, are rows to forget"
    refused(toy_recipe | {"evaluate": [{**audit, "by": None}]}, tmp_path, message)


@pytest.mark.parametrize("taught", [False, True])
def test_non_members_that_the_model_knows_are_refused(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path, taught: bool
) -> None:
    """One of the non-members is a row to forget, or one that was taught."""
    own = rows(["other"]) if taught else rows(["asia"])
    mixed = write_rows("mixed.jsonl", [*rows(["elsewhere"]), own[0]])
    entry = {
        "kind": "membership",
        "source": toy_recipe["forget"]["source"],
        "where": "topic = 'europe'",
        "non_members": str(mixed),
        "baseline": False,
    }
    recipe = toy_recipe | {"evaluate": [entry]}
    if taught:
        recipe["teach"] = {"source": toy_recipe["retain"]["source"], "text": "text", "epochs": 1}
    said = "were taught" if taught else "are rows to forget"
    refused(recipe, tmp_path, rf"evaluate: 1 rows \(first: row \d+\) of 'membership' are non-members and {said}")


def test_a_copy_of_the_base_is_no_model_to_compare_with(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(toy_recipe["model"]["path"], tmp_path / "copy")
    entry = {"kind": "membership", "source": toy_recipe["forget"]["source"], "baseline": False, "scores": ["reference"]}
    unseen = str(write_rows("unseen.jsonl", rows(["elsewhere"])))
    recipe = toy_recipe | {"evaluate": [{**entry, "non_members": unseen, "reference": str(copy)}]}
    refused(
        recipe, tmp_path, r"evaluate: 'membership' compares with '.*copy', which has the weights of the base itself"
    )
