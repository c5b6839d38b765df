"""Read a mergekit configuration (https://github.com/arcee-ai/mergekit) for the rules that spunge has too.

What would change the result and is not supported is refused by its key, never ignored: stacked layers, gradients, filters,
another tokenizer. Numbers may be written in any way that mergekit reads: 0.5, .5, 5e-1, "0.5".
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spunge.errors import RecipeError, suggestion
from spunge.recipe.spelling import NO_TEXT, read_foreign_yaml, yaml_text


class Method(NamedTuple):
    """One of mergekit's merge methods, in terms of ours."""

    settings: dict[str, Any]  # our rule, with the settings that compute what mergekit's defaults do
    reads: Mapping[str, str]  # mergekit's parameter -> our setting, one number for all models
    each: Mapping[str, str] = {}  # the same for those that each model may have its own of
    normalize: bool | None = None  # mergekit's default; None: it has no such parameter
    rescale: bool | None = None  # whether ours divides what is kept by its share; None: it has no such parameter
    weighted: bool = True  # whether each model must have a weight
    # mergekit's switch -> our setting, its value where the switch is on, and off; None: refused.
    switches: Mapping[str, tuple[str, str | None, str | None]] = {}
    one_model: bool = False  # goes from the base to one other model
    of_models: bool = False  # takes the models' own weights where there is no base


_LAMBDA, _DENSITY = {"lambda": "scale"}, {"density": "density"}
_DARE = {"density": 1.0, "normalize": False}
METHODS: dict[str, Method] = {
    "ties": Method({"rule": "ties", "density": 1.0, "scope": "tensor"}, _LAMBDA, _DENSITY, True, False),
    "task_arithmetic": Method({"rule": "task_arithmetic"}, _LAMBDA, {}, False, False),
    "linear": Method({"rule": "average"}, {}, {}, True),
    "dare_linear": Method({"rule": "dare_linear", **_DARE}, _LAMBDA, _DENSITY, False, True),
    "dare_ties": Method({"rule": "dare_ties", **_DARE}, _LAMBDA, _DENSITY, False, True),
    "della": Method(
        {"rule": "della", "density": 1.0, "epsilon": 0.15, "normalize": True},
        {**_LAMBDA, "epsilon": "epsilon"},
        _DENSITY,
        True,
        True,
    ),
    "breadcrumbs": Method(
        {"rule": "breadcrumbs", "density": 1.0, "gamma": 0.01, "scope": "tensor"},
        {**_LAMBDA, "gamma": "gamma"},
        _DENSITY,
        False,
        False,
    ),
    "della_linear": Method(
        {"rule": "della_linear", "density": 1.0, "epsilon": 0.15, "normalize": False},
        {**_LAMBDA, "epsilon": "epsilon"},
        _DENSITY,
        False,
        True,
    ),
    "breadcrumbs_ties": Method(
        {"rule": "breadcrumbs_ties", "density": 1.0, "gamma": 0.01, "scope": "tensor", "normalize": False},
        {**_LAMBDA, "gamma": "gamma"},
        _DENSITY,
        False,
        False,
    ),
    "sce": Method({"rule": "sce", "density": 1.0}, {"select_topk": "density"}, weighted=False),
    "slerp": Method({"rule": "slerp"}, {"t": "t"}, weighted=False, one_model=True),
    "nuslerp": Method(
        {"rule": "nuslerp"},
        {},
        switches={"nuslerp_flatten": ("by", "tensor", "row"), "nuslerp_row_wise": ("by", None, "tensor")},
        of_models=True,
    ),
    "multislerp": Method(
        {"rule": "multislerp"}, {}, switches={"normalize_weights": ("of", "deltas", None)}, of_models=True
    ),
    "karcher": Method({"rule": "karcher"}, {"max_iter": "tries", "tol": "tolerance"}, weighted=False, of_models=True),
    "model_stock": Method(
        {"rule": "model_stock"}, {}, weighted=False, switches={"filter_wise": ("by", "row", "tensor")}
    ),
    "nearswap": Method({"rule": "nearswap"}, {"t": "t"}, weighted=False, one_model=True),
    "arcee_fusion": Method({"rule": "arcee_fusion"}, {}, weighted=False, one_model=True),
}
# Where `normalize` is not mergekit's default, and ours has no setting for it: the rule that computes the same.
_OTHERWISE = {"task_arithmetic": "average", "linear": "weighted_sum"}
# Of mergekit's, and not ours: the nearest name is another method.
_OTHERS = ("passthrough", "ram", "ramplus_tl", "core_space")
_TOP = {
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
}
_HARMLESS = {"int8_mask"}  # what mergekit's arithmetic takes in memory
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """A configuration in spunge's words."""

    base: str
    models: list[str]
    weights: list[float]
    settings: dict[str, Any]  # of the rule
    notes: list[str] = field(default_factory=list)
    layers: int | None = None  # blocks that the file takes the models to have, where it says so


class Entry(NamedTuple):
    """A model that is merged, and the parameters that hold for it alone."""

    model: str
    adapter: str | None
    parameters: Mapping[str, Any]


class Inputs(NamedTuple):
    """What the file lists under `models`, or under its one slice."""

    entries: list[Entry]
    shared: Mapping[str, Any]  # parameters for all models
    base: Any
    layers: int | None


def read_mergekit(file: Path) -> Plan:
    """Raises RecipeError for what is no mergekit configuration, or asks for what spunge does not do."""
    content = _loaded(file)
    for key in content:
        if key not in _TOP:
            raise RecipeError(f"--mergekit: {key}: not supported{suggestion(str(key), sorted(_TOP))}")
    name = str(content["merge_method"])
    if name not in METHODS:
        if name in _OTHERS:
            raise RecipeError(f"--mergekit: merge_method: {name} is not supported; supported: {', '.join(METHODS)}")
        raise RecipeError(f"--mergekit: merge_method: no rule {name!r}{suggestion(name.lower(), METHODS)}")
    return _plan(name, content)


def _loaded(file: Path) -> dict[str, Any]:
    try:
        documents = read_foreign_yaml(yaml_text(file))
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"--mergekit: no file {str(file)!r}") from None
    except OSError as error:
        raise RecipeError(f"--mergekit: {str(file)!r} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--mergekit: {str(file)!r} is not YAML ({error})") from None
    if len(documents) > 1:
        raise RecipeError(f"--mergekit: {str(file)!r} holds {len(documents)} documents; give one merge a file")
    content = documents[0] if documents else None
    if not isinstance(content, dict) or "merge_method" not in content:
        raise RecipeError(f"--mergekit: {str(file)!r} has no merge_method; is it a mergekit configuration?")
    return content


def _plan(name: str, content: Mapping[str, Any]) -> Plan:
    inputs = _inputs(content)
    base, method = None if inputs.base is None else _base(inputs.base), METHODS[name]
    if name == "karcher" and base is not None:
        raise RecipeError("--mergekit: base_model: karcher takes the mean of all models; list them, and leave it out")
    themselves = base is None and (name == "linear" or method.of_models)
    if themselves and inputs.entries:
        base = inputs.entries[0].model  # any base gives the same
    if base is None:
        raise RecipeError(f"--mergekit: base_model: missing, and {name} needs it")
    # A listed base has no difference from itself, so it counts in a mean or a sum of models and nowhere else.
    own = themselves or name == "linear"
    entries = [entry for entry in inputs.entries if own or entry.adapter or not _same(entry.model, base)]
    if not entries:
        raise RecipeError("--mergekit: models: nothing to merge beside the base")
    if method.one_model and len(entries) != 1:
        raise RecipeError(f"--mergekit: models: {name} goes from base_model to one other model; list these two")
    settings = _settings(name, method, entries, inputs.shared)
    if themselves and method.of_models:
        settings["of"] = "models"
    weights = [_weight(name, method, entry, inputs.shared) for entry in entries]
    if (dtype := _dtype(content)) is not None:
        settings["dtype"] = dtype
    _check_tokenizer(content, base)
    notes = []
    if content.get("chat_template") == "auto":
        notes.append("mergekit's chat_template auto would take the models' commonest; the base's is kept")
    elif content.get("chat_template") is not None:
        raise RecipeError("--mergekit: chat_template: the base's is kept; leave it out")
    return Plan(base, [_source(entry, base) for entry in entries], weights, settings, notes, inputs.layers)


def _inputs(content: Mapping[str, Any]) -> Inputs:
    shared = _mapping("parameters", content.get("parameters"))
    listed = [key for key in ("models", "slices") if content.get(key)]
    if len(listed) > 1:
        raise RecipeError("--mergekit: slices: give either models or slices")
    if listed != ["slices"]:
        return Inputs(_entries("models", content.get("models") or []), shared, content.get("base_model"), None)
    if not isinstance(content["slices"], list) or len(content["slices"]) > 1:
        raise RecipeError("--mergekit: slices: layers cannot be picked or stacked; list whole models under `models`")
    inner = _mapping("slices", content["slices"][0])
    _only("slices", inner, {"sources", "base_model", "parameters"})
    sources = inner.get("sources") or []
    if not isinstance(sources, list):
        raise RecipeError(f"--mergekit: slices.sources: {sources!r} is no list")
    ranges = {str(source.get("layer_range")) for source in sources if isinstance(source, Mapping)}
    first = sources[0].get("layer_range") if sources and isinstance(sources[0], Mapping) else None
    if len(ranges) != 1 or not isinstance(first, list) or len(first) != 2 or first[0] != 0 or type(first[1]) is not int:
        raise RecipeError("--mergekit: layer_range: layers cannot be picked; give all of them, the same for each model")
    return Inputs(
        _entries("slices.sources", sources),
        {**shared, **_mapping("slices.parameters", inner.get("parameters"))},
        inner.get("base_model", content.get("base_model")),
        first[1],
    )


def _entries(key: str, items: Any) -> list[Entry]:
    if not isinstance(items, list):
        raise RecipeError(f"--mergekit: {key}: {items!r} is no list")
    options = []
    for item in items:
        if not isinstance(item, Mapping) or "model" not in item:
            raise RecipeError(f"--mergekit: {key}: {item!r} has no `model`")
        _only(key, item, {"model", "parameters", "layer_range"} if key != "models" else {"model", "parameters"})
        options.append(Entry(*_reference(item["model"]), _mapping(f"{key}.parameters", item.get("parameters"))))
    return options


def _reference(value: Any) -> tuple[str, str | None]:
    """A model and the adapter on it: `path`, `path+adapter`, or mergekit's {model: {path, revision}, lora: ...}."""
    if isinstance(value, Mapping):
        _only("model", value, {"model", "lora", "path", "revision", "override_architecture"})
        if value.get("override_architecture"):
            raise RecipeError("--mergekit: override_architecture: not supported")
        if "model" not in value:
            return _path(value), None
        lora = value.get("lora")
        return _path(value["model"]), None if lora is None else _path(lora)
    text = _path(value)
    if "+" not in text or os.path.isdir(os.path.expanduser(text)):
        return text, None
    model, _, adapter = text.partition("+")
    return model, adapter


def _path(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and not NO_TEXT.search(value["path"]):
        _only("model", value, {"path", "revision"})
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if isinstance(value, str) and value and not NO_TEXT.search(value):
        return value
    raise RecipeError(f"--mergekit: model {value!r}: give a folder or a Hub id")


def _base(value: Any) -> str:
    model, adapter = _reference(value)
    if adapter is not None:
        raise RecipeError(f"--mergekit: base_model: {model!r} with an adapter; merge it into the model first")
    return model


def _source(entry: Entry, base: str) -> str:
    """What is merged: the model, or the adapter where the model it stands on is the base."""
    if entry.adapter is None:
        return entry.model
    if not _same(entry.model, base):
        raise RecipeError(
            f"--mergekit: lora: {entry.adapter!r} stands on {entry.model!r}, which is not base_model; "
            "merge it into its model first, and give that"
        )
    return entry.adapter


def _same(one: str, other: str) -> bool:
    """Whether two references are the same folder, or the same id."""
    folders = [Path(os.path.expanduser(place)) for place in (one, other)]
    if all(map(os.path.isdir, folders)):
        return folders[0].resolve() == folders[1].resolve()
    return one == other


def _settings(name: str, method: Method, entries: Sequence[Entry], shared: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(method.settings)
    for key in dict.fromkeys([*shared, *(key for entry in entries for key in entry.parameters)]):
        values = [_constant(key, entry.parameters.get(key, shared.get(key))) for entry in entries]
        if key in _HARMLESS or key == "weight":
            continue
        if key == "normalize" and method.normalize is not None:
            _set_normalize(name, method, settings, values)
        elif key in ("rescale", "rescale_norm") and method.rescale is not None:
            _check_rescale(name, method, key, values)
        elif key in method.each:
            setting = method.each[key]
            filled = [settings[setting] if value is None else _number(key, value) for value in values]
            settings[setting] = filled[0] if len(set(filled)) == 1 else filled
        elif key in method.reads or key in method.switches:
            if len(set(values)) > 1:
                raise RecipeError(f"--mergekit: {key}: {name} has one for all models here; give it under `parameters`")
            if values[0] is not None and key in method.switches:
                setting, on, off = method.switches[key]
                if (chosen := on if _truth(key, values[0]) else off) is None:
                    raise RecipeError(f"--mergekit: {key}: {values[0]} is not supported with {name}; leave it out")
                settings[setting] = chosen
            elif values[0] is not None:
                settings[method.reads[key]] = _number(key, values[0])
        else:
            raise RecipeError(f"--mergekit: {key}: {name} has no such parameter here")
    if "t" in method.reads.values() and "t" not in settings:
        raise RecipeError(f"--mergekit: t: missing, and {name} needs it")
    return settings


def _set_normalize(name: str, method: Method, settings: dict[str, Any], values: Sequence[Any]) -> None:
    given = {method.normalize if value is None else _truth("normalize", value) for value in values}
    if len(given) > 1:
        raise RecipeError("--mergekit: normalize: one for all models; give it under `parameters`")
    wanted = given.pop()
    if "normalize" in settings:
        settings["normalize"] = wanted
    elif wanted != method.normalize and name in _OTHERWISE:
        settings["rule"] = _OTHERWISE[name]
    elif wanted != method.normalize:
        raise RecipeError(f"--mergekit: normalize: {name} always does{'' if method.normalize else ' not'} here")


def _check_rescale(name: str, method: Method, key: str, values: Sequence[Any]) -> None:
    if key == "rescale_norm" and any(value not in (None, "l1") for value in values):
        raise RecipeError(
            f"--mergekit: rescale_norm: {name} divides by the probability of being kept here; leave it out"
        )
    if key == "rescale" and any(value is not None and _truth(key, value) != method.rescale for value in values):
        raise RecipeError(f"--mergekit: rescale: {name} always does{'' if method.rescale else ' not'} here")


def _weight(name: str, method: Method, entry: Entry, shared: Mapping[str, Any]) -> float:
    value = _constant("weight", entry.parameters.get("weight", shared.get("weight")))
    if value is None and method.weighted:
        raise RecipeError(f"--mergekit: weight: missing for {entry.model!r}, and {name} needs it")
    weight = 1.0 if value is None else _number("weight", value)
    if not method.weighted and weight != 1:
        raise RecipeError(f"--mergekit: weight: {name} reads none; leave it out")
    return weight


def _constant(key: str, value: Any) -> Any:
    """A parameter that is the same in every tensor: plain, in a list of equal ones, or under a filter that takes all."""
    if isinstance(value, Mapping) and "value" in value and value.get("filter") in (None, "*"):
        return _constant(key, value["value"])
    if isinstance(value, list) and value:
        if isinstance(value[0], Mapping) and value[0].get("filter") in (None, "*"):
            return _constant(key, value[0])  # mergekit takes the first that fits
        if len({str(item) for item in value}) == 1:
            return _constant(key, value[0])
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RecipeError(f"--mergekit: {key}: gradients and filters over layers are not supported; give one number")


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        raise RecipeError(f"--mergekit: {key}: {value!r} is no number") from None


def _truth(key: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    given = str(value).lower().removesuffix(".0")
    if given not in words:
        raise RecipeError(f"--mergekit: {key}: {value!r} is neither true nor false")
    return words[given]


def _dtype(content: Mapping[str, Any]) -> str | None:
    """What mergekit would write: out_dtype, else the dtype it computes in, else what the models are stored in."""
    for key in ("out_dtype", "dtype"):
        if content.get(key) is not None:
            name = str(content[key]).removeprefix("torch.")
            if name not in _DTYPES:
                raise RecipeError(f"--mergekit: {key}: {name!r} is none of {', '.join(_DTYPES)}")
            return name
    return None


def _check_tokenizer(content: Mapping[str, Any], base: str) -> None:
    """Raises RecipeError for every tokenizer but the base's own."""
    source, tokenizer = content.get("tokenizer_source"), content.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        if extra := [key for key, value in tokenizer.items() if key != "source" and value]:
            raise RecipeError(f"--mergekit: tokenizer.{extra[0]}: the base's tokenizer is kept as it is; leave it out")
        source = tokenizer.get("source")
    elif tokenizer is not None:
        raise RecipeError(f"--mergekit: tokenizer: {tokenizer!r} is no mapping")
    if source is None or source == "base":
        return
    key = "tokenizer_source" if tokenizer is None else "tokenizer.source"
    if source == "union" or not _same(_base(source), base):
        raise RecipeError(f"--mergekit: {key}: only the base's tokenizer is kept; set it to base")


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise RecipeError(f"--mergekit: {key}: {value!r} is no mapping")


def _only(key: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"--mergekit: {key}.{name}: not supported{suggestion(str(name), sorted(known))}")
