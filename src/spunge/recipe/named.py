"""Settings that name a value of a registry, whose own settings they then are."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BeforeValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from spunge.errors import RecipeError
from spunge.recipe.block import Strict
from spunge.registry import Registry


@dataclass(frozen=True)
class Named:
    """Turns NAME or {key: NAME, ...} into the settings class that the value of that name declares."""

    registry: Registry[Any]
    key: str
    default: str | None = None
    texts: bool = False  # a plain text is no name but a setting of its own kind, and stays

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str) and not self.texts:
            value = {self.key: value}
        if not isinstance(value, Mapping):
            return value
        name = value.get(self.key, self.default)
        if not isinstance(name, str):
            raise ValidationError.from_exception_data(self.key, [self._unnamed(value)])
        # What is wrong inside is told by pydantic with its whole path: unlearn.steps, evaluate.2.limit.
        return self.registry.get(name).settings.model_validate({**value, self.key: name})

    def chosen(self, value: Any) -> type[Strict] | None:
        """The settings class of what a value names; None where it names nothing."""
        if self.texts and isinstance(value, str):
            return None
        name = value.get(self.key, self.default) if isinstance(value, Mapping) else value
        try:
            return self.registry.get(name).settings if isinstance(name, str) else None
        except RecipeError:
            return None

    def _unnamed(self, value: Mapping[Any, Any]) -> InitErrorDetails:
        """What is wrong where there is no name: most often the key is misspelt."""
        if self.key in value:
            return {"type": "string_type", "loc": (self.key,), "input": value[self.key]}
        if near := difflib.get_close_matches(self.key, [str(key) for key in value], n=1):
            return {"type": "extra_forbidden", "loc": (near[0],), "input": None}
        known = PydanticCustomError("unnamed", "missing; known: {known}", {"known": ", ".join(self.registry.names())})
        return {"type": known, "loc": (self.key,), "input": None}


def named(registry: Registry[Any], key: str, default: str | None = None, texts: bool = False) -> BeforeValidator:
    """Marks a setting that names a value of a registry: `Annotated[SerializeAsAny[AttackSettings], named(ATTACKS, "kind")]`."""
    return BeforeValidator(Named(registry, key, default, texts))
