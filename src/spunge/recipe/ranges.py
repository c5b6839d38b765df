"""Ranges in place of values under `unlearn` and `merge`, which `spunge tune` searches.

    unlearn: {method: npo, learning_rate: {low: 1e-5, high: 1e-3, log: true}, steps: {low: 20, high: 200}}
    merge: {rule: {choices: [ties, average]}}

Whole numbers give whole numbers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spunge.errors import RecipeError
from spunge.files import fingerprint

SEARCHED = ("unlearn", "merge")  # blocks that may hold ranges


@dataclass(frozen=True)
class Between:
    """Any number from low to high; `log`: as many draws in 1..10 as in 10..100."""

    low: int | float
    high: int | float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high


@dataclass(frozen=True)
class Among:
    """One of some values."""

    choices: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.choices


@dataclass(frozen=True)
class Searched:
    """A setting with a range. path: the keys and indices that lead to it."""

    path: tuple[str | int, ...]
    range: Between | Among

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


def ranges_in(content: Mapping[str, Any]) -> list[Searched]:
    """The ranges of a recipe's content, in its order. Raises RecipeError for one that is none."""
    return [each for block in SEARCHED if block in content for each in _below((block,), content[block])]


def _below(path: tuple[str | int, ...], value: Any) -> Iterator[Searched]:
    if isinstance(value, Mapping):
        if _is_range(value):
            yield Searched(path, _range(".".join(map(str, path)), value))
            return
        for key, inner in value.items():
            yield from _below((*path, key), inner)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _below((*path, place), inner)


def _is_range(value: Mapping[str, Any]) -> bool:
    if value.keys() == {"choices"}:
        return isinstance(value["choices"], list)
    ends = [value.get("low"), value.get("high")]
    return {"low", "high"} <= value.keys() <= {"low", "high", "log"} and ("log" in value or all(map(_is_number, ends)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range(name: str, value: Mapping[str, Any]) -> Between | Among:
    if "choices" in value:
        choices = value["choices"]
        if len({fingerprint([choice]) for choice in choices}) < max(2, len(choices)):
            raise RecipeError(f"{name}.choices: {choices!r:.60}: give two values or more, each once")
        return Among(tuple(choices))
    low, high, log = value["low"], value["high"], value.get("log", False)
    if not (_is_number(low) and _is_number(high)):
        raise RecipeError(f"{name}: low and high are numbers, not {low!r:.30} and {high!r:.30}")
    if not isinstance(log, bool):
        raise RecipeError(f"{name}.log: {log!r:.30}: it should be true or false")
    if not low < high:
        raise RecipeError(f"{name}: low {low} is not below high {high}")
    if log and low <= 0:
        raise RecipeError(f"{name}.low: {low}: a logarithmic range begins above 0")
    return Between(low, high, log)


def with_values(content: Mapping[str, Any], searched: Sequence[Searched], values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with a value in place of each range; `values` by the setting's name."""
    settled: dict[str, Any] = copy.deepcopy(dict(content))
    for setting in searched:
        at: Any = settled
        for step in setting.path[:-1]:
            at = at[step]
        at[setting.path[-1]] = copy.deepcopy(values[setting.name])
    return settled
