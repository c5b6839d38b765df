"""What there is to choose from, read off the code: methods, rules, evaluators, recipes; and what this machine has."""

import platform
import sys
import types
import typing
from typing import Any

from spunge.recipe.loading import shipped_recipes
from spunge.registry import EVALUATORS, METHODS, RULES, Registry

REGISTRIES: dict[str, Registry[Any]] = {"methods": METHODS, "rules": RULES, "evaluators": EVALUATORS}
KINDS = (*REGISTRIES, "recipes")


def listing(kind: str) -> list[dict[str, Any]]:
    """Every choice of a kind: name, summary, source, and its settings with type, default and description."""
    if kind == "recipes":
        return [
            {"name": file.stem, "summary": _first_comment(file.read_text(encoding="utf-8"))}
            for file in shipped_recipes()
        ]
    return [
        {"name": name, "summary": value.summary, "source": value.source, "settings": settings_of(value.settings)}
        for name, value in REGISTRIES[kind].items()
    ]


def settings_of(block: Any) -> dict[str, dict[str, Any]]:
    """A block's settings: name -> type, default, description. The key that names the choice itself is left out."""
    return {
        field: {"type": _type_name(info.annotation), "default": _default(info), "description": info.description or ""}
        for field, info in block.model_fields.items()
        if field not in ("method", "rule", "kind")
    }


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type_name(inner) for inner in arguments))
    if origin is not None and arguments:
        return f"{origin.__name__}[{', '.join(_type_name(inner) for inner in arguments)}]"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _default(info: Any) -> Any:
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _first_comment(text: str) -> str:
    return text.splitlines()[0].removeprefix("#").strip()


def listing_text(found: dict[str, list[dict[str, Any]]]) -> str:
    lines: list[str] = []
    for kind, entries in found.items():
        lines += [kind.upper(), ""]
        for entry in entries:
            source = f"  [{entry['source']}]" if entry.get("source") else ""
            lines.append(f"  {entry['name']}: {entry['summary']}{source}")
            for name, setting in entry.get("settings", {}).items():
                lines.append(f"      {name} = {setting['default']}   {setting['description']}")
        lines.append("")
    return "\n".join(lines).rstrip()


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
        "executable": sys.implementation.name,
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpus": ", ".join(devices),
        "bfloat16": f"{bfloat16_speedup():.1f} times float32's speed on this CPU (one matrix product)",
    }
