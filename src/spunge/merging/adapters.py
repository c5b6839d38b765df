"""PEFT LoRA adapters: read as branches, and written from a merged delta.

An adapter is read in the space of the weights, scale * B @ A per layer, never factor by factor: the mean of two A's and
the mean of two B's do not multiply to the mean of the products (Hu et al. 2021, arXiv:2106.09685).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from spunge.checkpoints import Checkpoint
from spunge.deltas import LowRank
from spunge.folders import write_json
from spunge.merging.sources import AdapterSource, config_of
from spunge.registry import RecipeError, suggestion

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
    stored = Checkpoint(folder)
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


class Fit(NamedTuple):
    """How much of a tensor's change an adapter of some rank holds."""

    name: str
    residual: float  # Frobenius norm of what is left out, over the norm of the change; 1 where nothing fits


_EMBEDDING = re.compile(r"(embed|wte|wpe)[^.]*\.weight$")


def write_adapter(out: Path, base: Path, changes: Iterable[tuple[str, Tensor]], rank: int) -> list[Fit]:
    """Write the LoRA adapter of the given rank that is nearest to a change of weights, tensor by tensor.

    The factors come from a randomised SVD (Halko et al. 2011, arXiv:0909.4061) with four power iterations. Tensors that
    are no matrices cannot be in an adapter: their residual is 1. Raises RecipeError when none is a matrix.
    """
    transposed = config_of(base).get("model_type") in ("gpt2", "imagegpt")  # Conv1D stores (in, out)
    stored: dict[str, Tensor] = {}
    fits: list[Fit] = []
    modules: list[str] = []
    for name, delta in changes:
        module = name.removesuffix(".weight")
        if delta.ndim != 2 or module == name:
            fits.append(Fit(name, 1.0))
            continue
        embedding = bool(_EMBEDDING.search(name))
        a, b, residual = factored(delta.T if embedding or transposed else delta, rank)
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        stored[f"base_model.model.{module}.{kind}A{end}"] = a
        stored[f"base_model.model.{module}.{kind}B{end}"] = b
        fits.append(Fit(name, residual))
        modules.append(module)
    if not modules:
        raise RecipeError("--as-adapter: the merge changes no matrix; write a delta instead (--as-delta)")
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / "adapter_config.json", _config(base, modules, rank, transposed))
    return fits


def factored(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (rank, in), B (out, rank) with B @ A near delta (out, in), and the relative residual."""
    kept = min(rank, *delta.shape)
    probe = torch.randn(delta.shape[1], min(kept + 8, *delta.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(delta @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    root = s[:kept].sqrt()
    b, a = (basis @ u[:, :kept]) * root, root.unsqueeze(1) * vh[:kept]
    if kept < rank:  # the adapter has one rank for all: pad with zeros
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], dim=1)
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
    norm = float(delta.norm())
    return a.contiguous(), b.contiguous(), float((delta - b @ a).norm()) / norm if norm else 0.0


def _config(base: Path, modules: Iterable[str], rank: int, transposed: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.resolve().name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
