"""What there is to choose from, read off the code: what can be named in a recipe, and recipes; and what this machine has."""

import inspect
import json
import platform
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from spunge.errors import RecipeError
from spunge.model.recalled import recalled
from spunge.recipe.block import Strict
from spunge.recipe.decoding import DECODERS
from spunge.recipe.loading import shipped_recipes
from spunge.recipe.named import Named
from spunge.registry import ATTACKS, ATTRIBUTES, EVALUATORS, EXECUTORS, METHODS, RULES, SCORERS, TRACKERS, Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "rules": RULES,
    "evaluators": EVALUATORS,
    "attacks": ATTACKS,
    "scorers": SCORERS,
    "attributes": ATTRIBUTES,
    "executors": EXECUTORS,
    "trackers": TRACKERS,
}
KINDS = (*REGISTRIES, "decode", "recipes")
# The setting that names the choice itself.
NAMING = {
    "methods": "method",
    "rules": "rule",
    "evaluators": "kind",
    "attacks": "kind",
    "scorers": "kind",
    "attributes": "kind",
    "executors": "kind",
    "trackers": "kind",
}


def listing(kind: str) -> list[dict[str, Any]]:
    """Every choice of a kind: name, summary, source, and its settings. A package's that cannot be imported says so.

    What this package's own code says of its choices is kept from one command to the next: to ask it, all of it is imported.
    """
    if kind == "recipes":
        return [
            {"name": file.stem, "summary": _first_comment(file.read_text(encoding="utf-8"))}
            for file in shipped_recipes()
        ]
    if kind == "decode":
        return [
            {
                "name": name,
                "summary": inspect.getdoc(block),
                "source": source,
                "settings": {field: told for field, told in settings_of(block).items() if field != "kind"},
            }
            for name, (block, source) in DECODERS.items()
        ]
    names, own = REGISTRIES[kind].names(), list(REGISTRIES[kind].builtin)
    entries = recalled(["listing", kind, own], lambda: [_listed(name, kind) for name in own])
    return [*entries, *(_listed(name, kind) for name in names[len(own) :])]


def _listed(name: str, kind: str) -> dict[str, Any]:
    try:
        value = REGISTRIES[kind].get(name)
    except RecipeError as error:
        return {"name": name, "summary": str(error), "source": "", "settings": {}}
    settings = {field: told for field, told in settings_of(value.settings).items() if field != NAMING[kind]}
    entry = {"name": name, "summary": value.summary, "source": value.source, "settings": settings}
    if kind == "attacks":
        return {**entry, "of": value.of, "reads": sorted(value.reads), "rows": value.rows}
    return entry


def settings_of(block: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """A block's settings: name -> type, default, description, and the settings of each block that it may hold."""
    return {field: _described(info) for field, info in block.model_fields.items()}


def _described(info: FieldInfo) -> dict[str, Any]:
    """A setting. pydantic keeps the marks of an annotation apart from it."""
    kind = _naming(info.metadata) or type_name(info.annotation)
    told = {"type": kind, "default": _default(info), "description": info.description or ""}
    blocks = {block_name(each): settings_of(each) for each in blocks_of(info)}
    return {**told, "blocks": blocks} if blocks else told


def blocks_of(info: FieldInfo) -> list[type[Strict]]:
    """The settings classes that a setting may hold, but for those of registered values, which are listed by themselves."""
    return [] if _naming(info.metadata) else list(_blocks_in(info.annotation))


def _blocks_in(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    elif typing.get_origin(annotation) is not typing.Annotated or not _naming(typing.get_args(annotation)):
        for inner in typing.get_args(annotation):
            yield from _blocks_in(inner)


def block_name(block: type[Strict]) -> str:
    """`{kind: lora}`, or the block's first settings."""
    if "kind" in block.model_fields:
        # One kind alone is a literal, with or without a default.
        return f"{{kind: {typing.get_args(block.model_fields['kind'].annotation)[0]}}}"
    names = list(block.model_fields)
    return f"{{{', '.join([*names[:2], '..'] if len(names) > 2 else names)}}}"


def type_name(annotation: Any) -> str:
    """An annotation as a recipe's author reads it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin is typing.Annotated:
        return _naming(arguments) or type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(inner) for inner in arguments))
    if origin is not None and arguments:
        return f"{origin.__name__}[{', '.join(type_name(inner) for inner in arguments)}]"
    if not isinstance(annotation, type):
        return str(annotation)
    if issubclass(annotation, Strict):
        return block_name(annotation)
    return "null" if annotation is type(None) else annotation.__name__


def _naming(marks: Iterable[Any]) -> str | None:
    """The type of a setting that names a registered value."""
    for mark in marks:
        if isinstance(mark, BeforeValidator) and isinstance(mark.func, Named):
            return f"{'str' if mark.func.texts else 'NAME'} | {{{mark.func.key}: NAME, ..}}"
    return None


def _default(info: FieldInfo) -> Any:
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _first_comment(text: str) -> str:
    return text.splitlines()[0].removeprefix("#").strip()


def listing_text(kinds: dict[str, list[dict[str, Any]]], settings: bool = True) -> str:
    """As a person reads it; without settings, a line an entry."""
    lines: list[str] = []
    for kind, entries in kinds.items():
        lines += [kind.upper(), ""]
        for entry in entries:
            source = f"  [{entry['source']}]" if entry.get("source") else ""
            lines.append(f"  {entry['name']}: {entry['summary']}{source}")
            if not settings:
                continue
            if "reads" in entry:
                lines.append(f"      {reads_text(entry)}")
            for name, setting in entry.get("settings", {}).items():
                lines.append(f"      {name} = {_as_written(setting['default'])}   {setting['description']}")
                lines += [
                    f"          {block}: {', '.join(name for name in inner if name != 'kind')}"
                    for block, inner in setting.get("blocks", {}).items()
                ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _as_written(default: Any) -> str:
    """A default as a recipe would have it: null and true, not None and True."""
    return default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)


def reads_text(attack: dict[str, Any]) -> str:
    """What an attack asks of its audit."""
    again = "measures the evaluation named by `of` again" if attack["of"] else "measures no other evaluation (no `of`)"
    reads = f"; its {', '.join(attack['reads'])}: {attack['rows']}" if attack["reads"] else ""
    return f"The audit {again}{reads}."


def environment() -> dict[str, str]:
    """Versions and devices."""
    import os

    import torch

    from spunge.model.loading import bfloat16_speedup
    from spunge.run.outcome import versions

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["none"]
    return {
        **versions(),
        "platform": platform.platform(),
        "interpreter": sys.implementation.name,
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpus": ", ".join(devices),
        "bfloat16": f"{bfloat16_speedup():.1f} times float32's speed on this CPU (one matrix product)",
    }
