"""What every model card says of its base: which one it is, whose licence it is under; and text as Markdown shows it."""

import re
from pathlib import Path
from typing import Any

import yaml

from spunge.errors import RecipeError
from spunge.recipe.spelling import read_foreign_yaml
from spunge.weights.checkpoint import read_config
from spunge.weights.folder import name_of
from spunge.weights.unlearning_layers import SUFFIX

# Models in a Hub cache lie in models--OWNER--NAME/snapshots/REVISION.
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/?$")


def base_identifier(base: Path) -> str:
    """The base's Hub id where it lies in a Hub cache or its config names it; else the folder's name, never its path."""
    cached = _CACHED.search(base.resolve().as_posix())
    if cached:
        return f"{cached['owner']}/{cached['name']}"
    try:
        named = str(read_config(base).get("_name_or_path") or "")
    except RecipeError:
        named = ""
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else name_of(base)


def loading(base: Path) -> list[str]:
    """What a card says of how a model is loaded, where that is not as ever; each a paragraph."""
    if not str(read_config(base).get("model_type")).endswith(SUFFIX):
        return []
    return [
        "The model has unlearning layers, bottlenecks after its feed-forward networks, that transformers does not know: it is "
        "loaded with `trust_remote_code=True`, which runs `unlearning_layers.py` of this repository. llama.cpp and vLLM do not "
        "load it. Who takes the layers out has the model that they were put into, with all that it knew."
    ]


def inherited(base: Path) -> dict[str, Any]:
    """Licence and language, which a merge takes over from its base."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    if front is None:
        return {}
    try:
        head = next(iter(read_foreign_yaml(front[1])), None)
    except yaml.YAMLError:
        return {}
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {key: head[key] for key in kept if isinstance(head, dict) and key in head}


def markdown(value: str) -> str:
    """Plain text inside Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(value.split()))
