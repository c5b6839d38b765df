"""Read a mergekit configuration (https://github.com/arcee-ai/mergekit) for the rules that spunge has too.

What would change the result and is not supported is refused by name, never ignored: slices of layers, gradients, filters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spunge.errors import RecipeError, suggestion

RULES: dict[
    str, dict[str, Any]
] = {  # mergekit's merge_method -> ours, with the settings that make ours compute the same
    "ties": {"rule": "ties", "density": 1.0, "scope": "tensor"},
    "task_arithmetic": {"rule": "task_arithmetic"},
    "linear": {"rule": "average"},
    "dare_linear": {"rule": "dare_linear", "density": 1.0, "normalize": False},
    "dare_ties": {"rule": "dare_ties", "density": 1.0, "normalize": False},
    "della": {"rule": "della", "density": 1.0, "epsilon": 0.15, "normalize": True},
    "breadcrumbs": {"rule": "breadcrumbs", "density": 1.0, "gamma": 0.01, "scope": "tensor"},
    "sce": {"rule": "sce", "density": 1.0},
    "slerp": {"rule": "slerp"},
}
_NAMES = {"lambda": "scale", "select_topk": "density"}  # mergekit's parameter -> ours
_TOP = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template"}
_HARMLESS = {"int8_mask"}
_RESCALES = {"dare_linear", "dare_ties", "della"}


@dataclass(frozen=True)
class Plan:
    """A configuration in spunge's words."""

    base: str
    models: list[str]
    weights: list[float]
    settings: dict[str, Any]  # of the rule
    notes: list[str] = field(default_factory=list)


def read_mergekit(file: Path) -> Plan:
    """Raises RecipeError for what is no mergekit configuration, or asks for what spunge does not do."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"--mergekit: no file {str(file)!r}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"--mergekit: {str(file)!r} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or "merge_method" not in content:
        raise RecipeError(f"--mergekit: {str(file)!r} has no merge_method; is it a mergekit configuration?")
    if "slices" in content:
        raise RecipeError("--mergekit: slices: layers cannot be picked or stacked; list whole models under `models`")
    for key in content:
        if key not in _TOP:
            raise RecipeError(f"--mergekit: {key}: not supported{suggestion(str(key), sorted(_TOP))}")
    method = str(content["merge_method"])
    if method not in RULES:
        raise RecipeError(f"--mergekit: merge_method: no rule {method!r}{suggestion(method, RULES)}")
    return _plan(method, content)


def _plan(method: str, content: Mapping[str, Any]) -> Plan:
    shared = dict(content.get("parameters") or {})
    entries = [_entry(item) for item in content.get("models") or []]
    base = content.get("base_model")
    notes = []
    if base is None and method == "linear" and entries:
        base = entries[0][0]  # any base gives the same mean
    if base is None:
        raise RecipeError(f"--mergekit: base_model: missing, and {method} needs it")
    base = _model(base)
    # A listed base has no difference from itself, so it counts in a mean of models and nowhere else.
    merged = entries if method == "linear" else [entry for entry in entries if entry[0] != base]
    if not merged:
        raise RecipeError("--mergekit: models: nothing to merge beside the base")
    settings: dict[str, Any] = dict(RULES[method])
    for key in dict.fromkeys([*shared, *(key for _model_name, given in merged for key in given)]):
        if key == "weight" or key in _HARMLESS:
            continue
        values = [_scalar(key, given.get(key, shared.get(key))) for _model_name, given in merged]
        _set(settings, method, key, values)
    weights = [_weight(given.get("weight", shared.get("weight")), method) for _model_name, given in merged]
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype:
        notes.append(f"mergekit's dtype {dtype} is not used: spunge computes in float32 and keeps the base's dtype")
    if content.get("tokenizer_source") not in (None, "base"):
        raise RecipeError("--mergekit: tokenizer_source: only the base's tokenizer is kept; set it to base")
    return Plan(base, [name for name, _given in merged], weights, settings, notes)


def _entry(item: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(item, Mapping) or "model" not in item:
        raise RecipeError(f"--mergekit: models: {item!r} has no `model`")
    return _model(item["model"]), item.get("parameters") or {}


def _model(value: Any) -> str:
    """A folder or Hub id; mergekit's `model+lora` would be two sources in one."""
    if isinstance(value, str) and "+" not in value:
        return value
    raise RecipeError(f"--mergekit: model {value!r}: give a folder or a Hub id; an adapter is a model of its own here")


def _scalar(key: str, value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(set(map(str, value))) == 1:
        return value[0]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RecipeError(f"--mergekit: {key}: gradients and filters over layers are not supported; give one number")


def _weight(value: Any, method: str) -> float:
    weight = _scalar("weight", value)
    if weight is None and method not in ("sce", "slerp"):
        raise RecipeError(f"--mergekit: weight: missing for a model, and {method} needs it")
    return 1.0 if weight is None else float(weight)


def _set(settings: dict[str, Any], method: str, key: str, values: Sequence[Any]) -> None:
    """Put one of mergekit's parameters into our settings: one number, or a list with one per model."""
    name = _NAMES.get(key, key)
    if key == "rescale":
        if any(value is not None and bool(value) != (method in _RESCALES) for value in values):
            raise RecipeError(f"--mergekit: rescale: {method} always does{'' if method in _RESCALES else ' not'} here")
        return
    if key == "normalize" and all(value is None or value == _normalizes(settings) for value in values):
        return
    if key == "normalize" and settings["rule"] in ("average", "task_arithmetic"):
        settings["rule"] = "average" if values[0] else "task_arithmetic"
        return
    allowed = {*settings, "scale", "t"} if settings["rule"] == "slerp" else {*settings, "scale"}
    if name not in allowed or name in ("rule", "scope"):
        raise RecipeError(f"--mergekit: {key}: {method} has no such parameter here")
    filled = [settings.get(name) if value is None else value for value in values]
    settings[name] = filled[0] if len(set(filled)) == 1 else filled


def _normalizes(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("normalize", settings["rule"] in ("ties", "average", "sce")))
