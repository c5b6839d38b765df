"""Validation, with every error as one line: the setting, the value, the mend."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from spunge.errors import RecipeError, suggestion
from spunge.recipe.block import SettingsT, Strict


def validated(settings: type[SettingsT], content: Any, prefix: str) -> SettingsT:
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explained(error, settings, prefix)) from None


def _explained(error: ValidationError, settings: type[Strict], prefix: str) -> str:
    """One error as one line: the setting, the value, the mend."""
    # A misspelt key comes before the key that is missing for it.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    kind, given = first["type"], first.get("input")
    steps, known = _walked(settings, first["loc"])
    name = ".".join([prefix, *steps] if prefix else steps)
    if kind == "extra_forbidden":
        return f"{name}: no such setting{suggestion(steps[-1], known)}"
    if kind == "missing":
        return f"{name}: missing; the recipe must give it"
    if kind == "value_error" and isinstance(first["ctx"]["error"], RecipeError):
        return str(first["ctx"]["error"])
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{name}: {message}" if name else message
    if kind == "model_type":
        return f"{name}: {_shown(given)}: it should be a mapping"
    if kind == "union_tag_invalid":
        return f"{name}.kind: {first['ctx']['tag']!r}: it should be one of {first['ctx']['expected_tags']}"
    return f"{name}: {_shown(given)}: {first['msg'].lower().replace('input should', 'it should')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walked(settings: type[Strict], place: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The settings on the way to an error, and the known keys of the block it is in.

    pydantic's own marks for the branch of a union that it tried are left out.
    """
    blocks: list[Any] = [settings]
    steps: list[str] = []
    for position, step in enumerate(place):
        inner = [block.model_fields[step].annotation for block in blocks if step in block.model_fields]
        if inner:
            steps.append(str(step))
            last = position == len(place) - 1
            blocks = blocks if last else [block for annotation in inner for block in _blocks_of(annotation)]
        elif isinstance(step, int) or (position == len(place) - 1 and not _is_mark(step)):
            steps.append(str(step))
        else:
            chosen = [block for block in blocks if step in (block.__name__, _kind_of(block))]
            blocks = chosen or blocks
    return steps, [name for block in blocks for name in block.model_fields]


def _kind_of(block: type[Strict]) -> Any:
    return block.model_fields["kind"].default if "kind" in block.model_fields else None


def _is_mark(step: str) -> bool:
    return step in ("float", "int", "str", "bool") or "[" in step or "constrained" in step


def _blocks_of(annotation: Any) -> list[Any]:
    """The settings classes inside an annotation such as `Rows | None` or `list[Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for inner in get_args(annotation) for block in _blocks_of(inner)]
