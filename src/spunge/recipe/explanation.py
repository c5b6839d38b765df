"""Validation, with every error as one line: the setting, the value, what to do."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from spunge.errors import RecipeError, suggestion
from spunge.recipe.block import SettingsT, Strict
from spunge.recipe.named import Named
from spunge.recipe.patterns import SPELLED


def validated(settings: type[SettingsT], content: Any) -> SettingsT:
    """The content as a block of settings. Raises RecipeError with one line that names the first setting that is wrong."""
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explained(error, settings, content)) from None


def _explained(error: ValidationError, settings: type[Strict], content: Any) -> str:
    """One error as one line: the setting, the value, what to do."""
    # A misspelt key comes before the key that is missing for it.
    first = _meant(min(error.errors(), key=lambda each: each["type"] != "extra_forbidden"), error)
    kind, given = first["type"], first.get("input")
    steps, known, inside = _walked(settings, first["loc"], content, unknown=kind == "extra_forbidden")
    name = ".".join(steps)
    if kind == "extra_forbidden":
        return f"{name}: no such setting{suggestion(steps[-1], known)}"
    if kind == "missing":
        return f"{name}: missing; the recipe must give it"
    if kind == "unnamed":
        return f"{name}: {first['msg']}"
    if kind == "value_error" and isinstance(first["ctx"]["error"], RecipeError):
        return str(first["ctx"]["error"])
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{name}: {message}" if name else message
    if kind == "model_type":
        such = f", such as {{{inside[0]}: {given}}}" if inside and isinstance(given, str) else ""
        return f"{name}: {_shown(given)}: it should be a mapping{such}"
    if kind == "list_type":
        such = f", such as [{given}]" if isinstance(given, str | int | float) else ""
        return f"{name}: {_shown(given)}: it should be a list{such}"
    if kind == "string_type" and isinstance(given, bool | int | float):
        return f"{name}: {_shown(given)}: it should be a text; in quotes it is one"
    if kind == "string_pattern_mismatch" and first["ctx"]["pattern"] in SPELLED:
        return f"{name}: {_shown(given)}: it should be {SPELLED[first['ctx']['pattern']]}"
    if kind == "union_tag_invalid":
        return f"{name}.kind: {first['ctx']['tag']!r}: it should be one of {first['ctx']['expected_tags']}"
    return f"{name}: {_shown(given)}: {first['msg'].lower().replace('input should', 'it should')}"


def _meant(first: ErrorDetails, error: ValidationError) -> ErrorDetails:
    """The error inside the block that was given, where a name or a block can be; else the error itself."""
    if first["type"] != "literal_error" or not isinstance(first["input"], Mapping):
        return first
    place = first["loc"][:-1]
    inside = (
        each for each in error.errors() if each["loc"][: len(place)] == place and len(each["loc"]) > len(place) + 1
    )
    return next(inside, first)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walked(
    settings: type[Strict], place: tuple[int | str, ...], content: Any, unknown: bool
) -> tuple[list[str], list[str], list[str]]:
    """The settings on the way to an error, the known keys of the block it is in, and of the block that it may be itself.

    pydantic's own marks for the branch of a union that it tried are left out; an unknown key may look like one.
    """
    kinds: list[tuple[Any, Sequence[Any]]] = [
        (settings, ())
    ]  # what the content at hand may be: annotations and their marks
    blocks: list[Any] = []
    steps: list[str] = []
    for position, step in enumerate(place):
        blocks = [block for annotation, marks in kinds for block in _blocks_of(annotation, marks, content)]
        fields = [block.model_fields[step] for block in blocks if step in block.model_fields]
        last = position == len(place) - 1
        if fields or isinstance(step, int) or (last and (unknown or not _is_mark(step))):
            steps.append(str(step))
            content = _inside(content, step)
            if fields:
                kinds = [(field.annotation, field.metadata) for field in fields]
        else:
            kinds = [(block, ()) for block in blocks if step in (block.__name__, _kind_of(block))] or kinds
    own = [block for annotation, marks in kinds for block in _blocks_of(annotation, marks, content)]
    return steps, _keys(blocks), _keys(own)


def _keys(blocks: Sequence[Any]) -> list[str]:
    return [name for block in blocks for name in block.model_fields]


def _inside(content: Any, step: int | str) -> Any:
    """What stands under a key or an index; None where nothing does."""
    if isinstance(content, Mapping):
        return content.get(step)
    return content[step] if isinstance(content, list) and isinstance(step, int) and step < len(content) else None


def _kind_of(block: type[Strict]) -> Any:
    return block.model_fields["kind"].default if "kind" in block.model_fields else None


def _is_mark(step: str) -> bool:
    return step in ("float", "int", "str", "bool") or "[" in step or "constrained" in step


def _blocks_of(annotation: Any, marks: Sequence[Any], content: Any) -> list[Any]:
    """The settings classes inside an annotation such as `Rows | None` or `list[Source]`; of a setting that names a value of
    a registry, the class that the name in the content stands for."""
    for mark in marks:
        if isinstance(mark, BeforeValidator) and isinstance(mark.func, Named) and (chosen := mark.func.chosen(content)):
            return [chosen]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return _blocks_of(inner, marks, content)
    return [block for inner in get_args(annotation) for block in _blocks_of(inner, (), content)]
