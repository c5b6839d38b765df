"""PEFT LoRA adapters, written from a merged delta."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.files import write_json
from spunge.weights.adapters import WEIGHTS
from spunge.weights.checkpoint import read_config
from spunge.weights.writing import write_tensors


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
    transposed = read_config(base, "--base").get("model_type") in ("gpt2", "imagegpt")  # Conv1D stores (in, out)
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
    write_tensors(out / WEIGHTS, stored, {"format": "pt"})
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
