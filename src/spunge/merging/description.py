"""The config.json of a merged folder: the base's, made to say what its weights are: their dtype, not quantised, tied or not."""

from pathlib import Path
from typing import Any

from torch import nn

from spunge.files import read_json, write_json
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.names import UnbuildableError, layout_of, skeletons
from spunge.weights.quantised import described

_OF_QUANTISATION = ("quantization_config", "compression_config")


def describe(folder: Path, dtype: str) -> list[str]:
    """Settle the copied config.json of a folder whose weights and index are there. dtype: base, or a dtype's name.

    Returns notes on what the base's says otherwise.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return []
    before = read_json(folder / "config.json")
    if described(config) is None:
        _drop_quantisation(config)
    if dtype != "base":
        _set_dtype(config, dtype, top=True)
    if config != before:
        write_json(folder / "config.json", config)
    torn = _torn(Checkpoint(folder, "--out"))
    if not torn:
        return []
    _untie(config)
    write_json(folder / "config.json", config)
    return [
        f"{torn!r} is no longer what the base ties it to: config.json says that they are apart (tie_word_embeddings: false)"
    ]


def _drop_quantisation(config: dict[str, Any]) -> None:
    """Settings that are empty or switched off: other loaders than ours take them for a quantised model, or refuse them."""
    for key in _OF_QUANTISATION:
        config.pop(key, None)
    for value in config.values():
        if isinstance(value, dict):
            _drop_quantisation(value)


def _set_dtype(config: dict[str, Any], dtype: str, top: bool = False) -> None:
    """transformers loads a model in the dtype that its config names, that of a nested part included."""
    named = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    for key in named or (["torch_dtype"] if top else []):  # which every version of transformers reads
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, dtype)


def _untie(config: dict[str, Any]) -> None:
    """At the top, and in the language part where there is one: architectures differ in which they read."""
    config["tie_word_embeddings"] = False
    for key, value in config.items():
        if isinstance(value, dict) and (key == "text_config" or "tie_word_embeddings" in value):
            value["tie_word_embeddings"] = False


def _torn(merged: Checkpoint) -> str | None:
    """A tensor that the model ties to another, and the folder holds with other values. Few bases store tied tensors twice: only
    of those is a model built."""
    if len(merged.embeddings) < 2:
        return None
    try:
        models = [make() for make in skeletons(merged.folder)]
    except UnbuildableError:
        return None
    for model in models:
        aliases, first = layout_of(model, merged).aliases, _first_names(model)
        if torn := [name for name in aliases if aliases[name] != first[name]]:
            return torn[0]
    return None


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name of the model's tensors -> the first name of the same tensor."""
    known: dict[int, str] = {}
    return {name: known.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
