"""What a recipe's settings of one method become where an override names another: they stay, and are told."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from spunge.recipe.loading import read_draft
from spunge.registry import METHODS


def carried_told(source: str, overrides: Iterable[str]) -> str:
    """`unlearn: rmu is run with what the recipe says for npo: learning_rate 0.001 (its own: 0.0005); ..`, or nothing.

    Nothing where the method stays, and of settings that an override gives too. Raises RecipeError as the recipe does.
    """
    overrides = list(overrides)
    given = {override.partition("=")[0].strip() for override in overrides}
    if "unlearn.method" not in given:
        return ""
    before, after = (read_draft(source, lines).content.get("unlearn") for lines in ((), overrides))
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)) or before.get("method") == after["method"]:
        return ""
    said = {path.split(".")[1] for path in given if path.startswith("unlearn.")}
    fields = METHODS.get(after["method"]).settings.model_fields
    kept = []
    for name in [name for name in before if name in fields and name not in said]:
        own = fields[name].get_default(call_default_factory=True)
        if after[name] != (own.model_dump() if isinstance(own, BaseModel) else own):
            kept.append(f"{name} {_shown(after[name])}" + (f" (its own: {own})" if _is_plain(own) else ""))
    if not kept:
        return ""
    return (
        f"unlearn: {after['method']} is run with what the recipe says for {before.get('method')}: {', '.join(kept)}; "
        "--set unlearn.NAME=VALUE changes it"
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _shown(value: Any) -> str:
    """A setting in short: of a block, what it is."""
    return str(value.get("kind", "{..}")) if isinstance(value, Mapping) else str(value)
