"""What a tracker is: where losses and scores of a run go beside its folder. It decides nothing, and no result depends on it.

Keys come from the environment alone, under the names that the tracker's own package gives them.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from spunge.recipe.tracking import TrackSettings
from spunge.registry import summary_of

S = TypeVar("S", bound=TrackSettings)


class Tracked(NamedTuple):
    """The run that is told of. recipe: as JSON values, without secrets."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]


class Log(Protocol):
    """Where numbers go."""

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """What is known after a step. group: a training, such as `branches/europe`, or `scores/merged`. Values are finite."""


@dataclass(frozen=True)
class Tracker(Generic[S]):
    """The first line of `log`'s docstring is what lists say of it."""

    settings: type[S]
    source: str
    package: str  # that is imported, and comes with the extra
    extra: str
    log: Callable[[S, Tracked], AbstractContextManager[Log]]
    version: int = 1

    @property
    def summary(self) -> str:
        return summary_of(self.log)


def key(*parts: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^\w .:/-]", "_", "/".join(parts))
