"""PEFT LoRA adapters, opened as a difference from the base.

An adapter is read in the space of the weights, scale * B @ A per layer, never factor by factor: the mean of two A's and
the mean of two B's do not multiply to the mean of the products (Hu et al. 2021, arXiv:2106.09685).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spunge.errors import RecipeError, suggestion
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.sources import AdapterSource

WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_UNSUPPORTED = {"use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA"}


def open_adapter(folder: Path, base: Checkpoint, label: str) -> AdapterSource:
    """Read an adapter's factors. Raises RecipeError for kinds of adapter that are no plain LoRA, naming what is not."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"--model: {label!r} is a {config.get('peft_type')} adapter; only LORA can be merged")
    for key, kind in _UNSUPPORTED.items():
        if config.get(key):
            raise RecipeError(
                f"--model: {label!r} uses {kind} ({key}); merge it into its base with peft and give that model"
            )
    if not (folder / WEIGHTS).exists():
        raise RecipeError(
            f"--model: {label!r} has no {WEIGHTS}; pickled adapters are not read, save it with safetensors"
        )
    stored = Checkpoint(folder, "--model", WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, Tensor] = {}
    for key in stored.tensors:
        plain = key.removeprefix("base_model.model.")
        match = _FACTOR.match(plain)
        if match:
            name = base_name(f"{match['module']}.weight", base, label)
            pairs.setdefault(name, {})[match["side"]] = stored.read(key).float()
            if match["embedding"]:
                embeddings.add(name)
        elif ".lora_" in plain or not plain.endswith((".weight", ".bias")):
            raise RecipeError(f"--model: {label!r} holds {key!r}, which is no LoRA factor; merge it with peft first")
        else:  # a module trained whole (modules_to_save), or a bias
            whole = plain.replace(".modules_to_save.default", "").replace(".base_layer.", ".")
            replaced[base_name(whole, base, label)] = stored.read(key)
    factors = {name: _low_rank(name, pair, config, name in embeddings, label) for name, pair in pairs.items()}
    content = json.dumps(
        {key: config.get(key) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    )
    digest = hashlib.sha256(content.encode() + (folder / WEIGHTS).read_bytes()).hexdigest()
    return AdapterSource(label, digest, factors, replaced)


def base_name(name: str, base: Checkpoint, label: str) -> str:
    """The base's name of an adapted tensor: the same, or the only one that ends or begins alike."""
    if name in base.tensors:
        return name
    near = [known for known in base.tensors if known.endswith("." + name) or name.endswith("." + known)]
    if len(near) != 1:
        raise RecipeError(
            f"--model: {label!r} adapts {name!r}, which the base lacks{suggestion(name, near or base.tensors)}"
        )
    return near[0]


def _low_rank(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], embedding: bool, label: str) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise RecipeError(f"--model: {label!r} holds only factor {''.join(pair)} for {name!r}; the file is incomplete")
    rank = pair["A"].shape[0]
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # PEFT keeps an embedding's factors as (r, vocabulary) and (hidden, r): the weight is the product's transpose.
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return LowRank(pair["A"], pair["B"], float(scale), transposed)


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's own rule: a pattern matches a whole module name or its end."""
    module = name.removesuffix(".weight")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
