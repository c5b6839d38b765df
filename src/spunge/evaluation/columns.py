"""Which columns hold an evaluation's texts, where they are scored as forget's rows are learned."""

from collections.abc import Mapping
from typing import Protocol

from spunge.errors import RecipeError


class Columns(Protocol):
    """Settings that name columns of texts; null: forget's own columns."""

    @property
    def text(self) -> str | None: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def completion(self) -> str | None: ...
    @property
    def messages(self) -> str | None: ...


def sample_columns(settings: Columns, forget: Mapping[str, str], setting: str) -> dict[str, str]:
    """Role -> column or SQL expression: what the settings name, else forget's. Raises RecipeError for a mixture of roles."""
    given = {
        "text": settings.text,
        "prompt": settings.prompt,
        "completion": settings.completion,
        "messages": settings.messages,
    }
    named = {role: value for role, value in given.items() if value}
    if named and set(named) not in ({"text"}, {"prompt", "completion"}, {"messages"}):
        raise RecipeError(f"{setting}: give either text, or prompt and completion, or messages")
    return named or dict(forget)
