"""What a text in a recipe has to look like is said in words."""

from collections.abc import Iterator
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.recipe.patterns import SPELLED
from spunge.recipe.schema import Recipe
from spunge.registry import ATTACKS, ATTRIBUTES, EVALUATORS, METHODS, RULES, SCORERS


def patterns_in(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        yield from (found for value in schema.values() for found in patterns_in(value))
    elif isinstance(schema, list):
        yield from (found for value in schema for found in patterns_in(value))


def test_every_pattern_of_a_setting_is_spelled_out() -> None:
    registries = (METHODS, RULES, EVALUATORS, ATTACKS, SCORERS, ATTRIBUTES)
    blocks = [Recipe, *(registry.get(name).settings for registry in registries for name in registry.names())]
    assert {pattern for block in blocks for pattern in patterns_in(block.model_json_schema())} == SPELLED.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["unlearn={method: whp, ask: {base_url: localhost:8000/v1, model: m}}"],
            r"unlearn\.ask\.base_url: 'localhost:8000/v1': it should be the address of an endpoint, such as http://localhost",
        ),
        (
            ["controls=[{name: My control, train: joint}]"],
            r"controls\.0\.name: 'My control': it should be a name of small letters",
        ),
    ],
)
def test_an_error_names_no_pattern(toy_recipe: dict[str, Any], changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as told:
        load_recipe(toy_recipe, changes)
    assert not any(pattern in str(told.value) for pattern in SPELLED)
