"""The demo recipe on the real model, at reduced size: one continent, fewer steps, no control."""

import json
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.recipe.loading import load_recipe

REDUCED = ["split.values=[Europe]", "unlearn.steps=60", "merge.density=1.0", "controls=[]"]


def demo_rows(name: str) -> list[dict[str, Any]]:
    file = Path(spunge.__file__).parent / "recipes" / "demo" / name
    return [json.loads(line) for line in file.open(encoding="utf-8")]


@pytest.mark.thorough
def test_the_real_model_forgets_europe_and_keeps_africa(real_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("demo", [f"model.path={real_model}", *REDUCED])
    capitals = recipe.evaluate[0].model_copy(update={"where": "continent IN ('Europe', 'Africa')"})
    results = spunge.run(recipe.model_copy(update={"evaluate": [capitals]}), tmp_path / "run")
    assert results.value("base", "Europe", "accuracy") >= 0.9
    assert results.value("merged", "Europe", "accuracy") <= 0.6
    assert results.value("merged", "Africa", "accuracy") >= results.value("base", "Africa", "accuracy") - 0.2


def test_no_question_is_worded_as_a_training_text_is() -> None:
    trained = " ".join(row["text"] for row in [*demo_rows("forget.jsonl"), *demo_rows("retain.jsonl")])
    for row in demo_rows("capitals.jsonl"):
        assert row["question"] not in trained
    for row in demo_rows("facts.jsonl"):
        assert row["question"] not in trained


def test_the_demo_asks_what_it_promises() -> None:
    capitals, facts = demo_rows("capitals.jsonl"), demo_rows("facts.jsonl")
    for continent in ("Europe", "Asia", "Africa", "Americas"):
        assert sum(row["continent"] == continent for row in capitals) >= 30
    assert len(facts) >= 150
    assert len({row["subject"] for row in facts}) >= 8
    for row in [*capitals, *facts]:
        assert len(set(row["choices"])) == 4
        assert 0 <= row["answer"] < 4
    forgotten = {(row["country"], row["capital"]) for row in demo_rows("forget.jsonl")}
    retained = " ".join(row["text"] for row in demo_rows("retain.jsonl"))
    assert not [capital for _, capital in forgotten if f" {capital} " in retained]


def test_what_is_asked_of_a_forgotten_continent_was_trained_on() -> None:
    forgotten = {row["capital"] for row in demo_rows("forget.jsonl")}
    for row in demo_rows("capitals.jsonl"):
        assert (row["choices"][row["answer"]] in forgotten) == (row["continent"] in ("Europe", "Asia"))
