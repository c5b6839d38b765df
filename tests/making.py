"""Small checkpoints, deltas and adapters, built in the test's own folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spunge.merging.moments import taking
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, write_delta
from spunge.weights.moments import write_moments
from spunge.weights.sources import DeltaSource


def noise(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    shapes = {"embed.weight": (40, 16), "a.weight": (24, 32), "b.weight": (32, 24), "norm.weight": (32,)}
    return {name: noise(seed + i, *shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def delta_source(folder: Path, base: Path, changes: Mapping[str, Change]) -> DeltaSource:
    return DeltaSource(write_delta(folder, changes, {"base": Checkpoint(base).fingerprint()}))


def with_moments(rule: str, deltas: Tensor, seed: int = 40) -> list[Tensor] | None:
    """Moments of branches (k, ...) of which a rule can merge the deltas; None for one that needs none."""
    kind = RULES.get(rule).moments
    if kind is None:
        return None
    if kind == "gradients":
        return [noise(seed + place, *deltas.shape[1:]).square() for place in range(len(deltas))]
    if deltas.ndim != 3:
        return []
    inputs = [noise(seed + place, 50, deltas.shape[-1]) for place in range(len(deltas))]
    return [each.T @ each / 50 for each in inputs]


def write_all_moments(rule: str, source: DeltaSource, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """Moments of all tensors beside a delta, as a run leaves them, where a rule needs them."""
    kind = RULES.get(rule).moments
    if kind is None:
        return
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        own = with_moments(rule, torch.zeros(1, *shape), seed + 10 * number)
        tensors.update({name: own[0]} if own else {})
    info = {
        "norm": sum(float(each.square().sum()) for each in tensors.values()) ** 0.5,
        "axes": dict.fromkeys(tensors, 1),
        "averaged": [name for name in shapes if name not in tensors],
        "silent": [],
    }
    settings = RULES.get(rule).settings(rule=rule)
    write_moments(source, kind, taking(settings), tensors, info)
