"""Values as results.json has them. A number that JSON has no word for is named there, as Protocol Buffers does."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _real(value: Any) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.60} is no number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number too large") from None


def _score(value: Any) -> float:
    return math.nan if value is None else _real(value)


_NUMBER = WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]})
Real = Annotated[float, BeforeValidator(_real), _NUMBER]
Score = Annotated[float, BeforeValidator(_score), _NUMBER]  # null is read as NaN, which some programs write so


def json_value(value: Any) -> Any:
    """As JSON values: a dataclass as a mapping without what is at its default, a number that is not finite as its name."""
    if is_dataclass(value):
        known = {each.name: vars(value)[each.name] for each in dataclasses.fields(value) if not _left_out(value, each)}
        return {name: json_value(inner) for name, inner in known.items()}
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def real(value: Any) -> Any:
    """A number that a file has as a name; anything else as it is."""
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _left_out(value: Any, of: dataclasses.Field[Any]) -> bool:
    return of.default is not MISSING and vars(value)[of.name] == of.default
