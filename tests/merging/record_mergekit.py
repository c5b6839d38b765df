"""Records what mergekit computes on small inputs, for test_rules.py. Run where mergekit 0.1.5 is installed:

python tests/merging/record_mergekit.py > tests/merging/mergekit.json
"""

import json

import torch
from mergekit.merge_methods.arcee_fusion import arcee_fusion_merge_method
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.karcher import karcher_merge_tensors
from mergekit.merge_methods.model_stock import model_stock_merge_method
from mergekit.merge_methods.multislerp import multislerp
from mergekit.merge_methods.nearswap import nearswap_merge
from mergekit.merge_methods.nuslerp import nuslerp
from mergekit.merge_methods.sce import sce_mask, sce_weight
from mergekit.merge_methods.slerp import slerp
from mergekit.sparsify import magnitude, magnitude_outliers

K, SHAPE = 3, (6, 8)


def elected(deltas: torch.Tensor, weights: torch.Tensor, normalize: bool) -> torch.Tensor:
    parts = deltas * weights
    mask = get_mask(parts, method="sum")
    total, divisor = (parts * mask).sum(dim=0), (weights * mask).sum(dim=0)
    divisor[divisor == 0] = 1
    return total / divisor if normalize else total


def spheres(base: torch.Tensor, deltas: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    models = base + deltas
    group = TensorGroup.from_tensors([base.clone(), *models.clone()], base_index=0)
    pair = TensorGroup.from_tensors([base, models[0]], base_index=0)
    shares = (weights / weights.sum()).tolist()
    each = {"weight": dict(enumerate(weights.tolist(), start=1))}
    t = float(weights[1] / (weights[0] + weights[1]))
    return {
        "karcher": karcher_merge_tensors(list(models), shares, max_iter=1000, tol=1e-7) - base,
        "karcher of deltas": karcher_merge_tensors(list(deltas), shares, max_iter=1000, tol=1e-7),
        "multislerp": multislerp([group], parameters=each)[0] - base,
        "nuslerp": nuslerp(t, deltas[0], deltas[1], flatten=True),
        "nuslerp by row": nuslerp(t, deltas[0], deltas[1]),
        "nuslerp of models": nuslerp(t, models[0], models[1], flatten=True) - base,
        "model_stock": model_stock_merge_method([group])[0] - base,
        "model_stock by row": model_stock_merge_method([group], parameters={"filter_wise": True})[0] - base,
        "nearswap": nearswap_merge([pair], parameters={"t": 0.3})[0] - base,
        "arcee_fusion": arcee_fusion_merge_method([pair])[0] - base,
    }


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator)
    deltas = torch.randn(K, *SHAPE, generator=generator)
    weights = torch.tensor([1.0, 0.5, 2.0])
    wide = weights.reshape(-1, 1, 1)
    trimmed = torch.stack([magnitude(delta, 0.4) for delta in deltas])
    middle = torch.stack([magnitude_outliers(delta, 0.5, gamma=0.1) for delta in deltas])
    selected = deltas * sce_mask(deltas, 0.3)
    erase = get_mask(selected, method="sum")
    shares = sce_weight(selected).reshape(-1, 1, 1) * erase
    results = {
        "ties": elected(trimmed, wide, normalize=True),
        "task_arithmetic": (deltas * wide).sum(dim=0),
        "breadcrumbs": (middle * wide).sum(dim=0),
        "sce": (selected * shares).sum(dim=0) / shares.sum(dim=0).clamp(min=1e-6),
        "breadcrumbs_ties": elected(middle, wide, normalize=False),
        **spheres(base, deltas, weights),
        "slerp": slerp(torch.tensor([0.3]), (base + deltas[0])[None], (base + deltas[1])[None])[0] - base,
    }
    content = {"base": base, "deltas": deltas, "weights": weights, **results}
    print(json.dumps({name: value.tolist() for name, value in content.items()}))


main()
