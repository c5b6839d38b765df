"""A block of settings: the class that methods, rules, evaluators and the recipe itself declare theirs with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

TRUTH = PydanticCustomError("truth", "it should be a number, not true or false")


@dataclass(frozen=True)
class Place:
    """Marks a setting whose texts are places: `Annotated[str, Place("model")]`. They are made absolute.

    model: a folder, or else a Hub id, which stays as it is. file: always a path. Also inside lists and mappings' values.
    """

    kind: Literal["model", "file"]


class Strict(BaseModel):
    """A block of settings that refuses keys it does not know, numbers without end, and truth values in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, content: Any) -> Any:
        # Python takes true for 1, and `steps: true` would train one step.
        for name, value in content.items() if isinstance(content, Mapping) else ():
            kinds = _types_in(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            if kinds & {int, float} and bool not in kinds and _has_truth(value):
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": TRUTH, "loc": (name,), "input": value}]
                )
        return content


def _types_in(annotation: Any) -> set[type]:
    """The plain types inside an annotation such as `list[int | float] | None`."""
    inner = get_args(annotation)
    if not inner:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_types_in, inner))


def _has_truth(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_truth, value.values()))
    return any(map(_has_truth, value)) if isinstance(value, list) else isinstance(value, bool)


SettingsT = TypeVar("SettingsT", bound=Strict)
