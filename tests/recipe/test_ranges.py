"""Ranges in place of values: which mappings are ranges, which are settings that look like one."""

from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe, read_draft
from spunge.recipe.ranges import Among, Between, ranges_in, with_values
from spunge.run.trials import space_of

DENSITY = {"low": 0.1, "high": 0.5}


def test_ranges_are_found_at_any_depth_and_replaced_by_values() -> None:
    content = {
        "unlearn": {"steps": {"low": 2, "high": 8}, "trainable": {"kind": "lora", "rank": {"choices": [4, 8]}}},
        "merge": {"density": [DENSITY, 0.3], "scale": {"low": 1, "high": 2, "log": True}},
        "evaluate": [{"limit": {"low": 1, "high": 2}}],
    }
    searched = ranges_in(content)
    assert {each.name: each.range for each in searched} == {
        "unlearn.steps": Between(2, 8),
        "unlearn.trainable.rank": Among((4, 8)),
        "merge.density.0": Between(0.1, 0.5),
        "merge.scale": Between(1, 2, True),
    }
    values = {"unlearn.steps": 3, "unlearn.trainable.rank": 8, "merge.density.0": 0.2, "merge.scale": 1}
    settled = with_values(content, searched, values)
    assert settled["unlearn"] == {"steps": 3, "trainable": {"kind": "lora", "rank": 8}}
    assert settled["merge"] == {"density": [0.2, 0.3], "scale": 1}
    assert content["merge"]["density"] == [DENSITY, 0.3]


def test_a_setting_of_parts_that_are_called_low_and_high_is_no_range(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["unlearn"]["max_lengths"] = {"low": 32, "high": 64}
    assert load_recipe(toy_recipe).model_dump()["unlearn"]["max_lengths"] == {"low": 32, "high": 64}
    toy_recipe["merge"]["density"] = DENSITY
    assert [each.name for each in space_of(read_draft(toy_recipe)).searched] == ["merge.density"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"low": 2, "high": 1}, "merge.scale: low 2 is not below high 1"),
        ({"low": "a", "high": 1, "log": True}, "merge.scale: low and high are numbers, not 'a' and 1"),
        ({"low": 0.1, "high": 1, "log": 1}, "merge.scale.log: 1: it should be true or false"),
        ({"low": 0.0, "high": 1.0, "log": True}, "merge.scale.low: 0.0: a logarithmic range begins above 0"),
        ({"choices": [1, 1]}, r"merge.scale.choices: \[1, 1\]: give two values or more, each once"),
        ({"low": 1, "hihg": 2}, r"merge.scale: .*it should be a valid number"),
        (1.0, "tune: the recipe has no range under unlearn or merge"),
    ],
)
def test_what_is_no_range_is_refused_in_a_line(toy_recipe: dict[str, Any], value: Any, said: str) -> None:
    toy_recipe["merge"]["scale"] = value
    with pytest.raises(RecipeError, match=said):
        space_of(read_draft(toy_recipe))
