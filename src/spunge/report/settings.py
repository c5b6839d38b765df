"""What differs between the recipes of several runs: a line a setting, the values beside each other."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spunge.errors import RecipeError
from spunge.recipe.spelling import read_yaml

RECIPE = "recipe.yaml"
NAMED = ("name", "kind", "train")  # by the first of these that it has, an entry of a list is known
GIVEN = "given"  # the value of such an entry itself


class Setting(NamedTuple):
    """A setting and each run's value as the recipe spells it; None where a recipe does not have it."""

    name: str
    values: tuple[str | None, ...]


def differing(runs: Sequence[Path]) -> list[Setting]:
    """The settings that not all of the runs' recipes give the same value. Raises RecipeError for a recipe that cannot be read."""
    recipes = [dict(flat(recipe)) if (recipe := recipe_of(run)) else {} for run in runs]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    every = [Setting(name, tuple(recipe.get(name) for recipe in recipes)) for name in names]
    differ = [setting for setting in every if len(set(setting.values)) > 1]
    # Of an entry that a recipe lacks whole, such as an evaluation, that is all there is to say.
    lacking = [f"{setting.name}." for setting in differ if GIVEN in setting.values]
    return [setting for setting in differ if not setting.name.startswith(tuple(lacking))]


def recipe_of(run: Path) -> Mapping[str, Any]:
    """A run's recipe as it stands in its folder, unchecked; empty where there is none. Nothing that it names is loaded."""
    file = run / RECIPE
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{str(file)!r} cannot be read ({type(error).__name__}); `spunge run` writes it anew"
        ) from None
    return content if isinstance(content, Mapping) else {}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`unlearn.steps`, `80`: nested mappings by dots, a list's mappings by their names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            named = next((each[key] for key in NAMED if each.get(key)), number)
            yield f"{prefix}.{named}", GIVEN
            yield from flat(each, f"{prefix}.{named}")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
