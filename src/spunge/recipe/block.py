"""A block of settings: the class that methods, rules, evaluators and the recipe itself declare theirs with."""

from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Place:
    """Marks a setting whose texts are places: `Annotated[str, Place("model")]`. They are made absolute.

    model: a folder, or else a Hub id, which stays as it is. file: always a path. Also inside lists and mappings' values.
    """

    kind: Literal["model", "file"]


class Strict(BaseModel):
    """A block of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SettingsT = TypeVar("SettingsT", bound=Strict)
