"""Records what mergekit computes on small inputs, for test_rules.py. Run where mergekit 0.1.5 is installed:

python tests/merging/record_mergekit.py > tests/merging/mergekit.json
"""

import json

import torch
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
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
        "slerp": slerp(torch.tensor([0.3]), (base + deltas[0])[None], (base + deltas[1])[None])[0] - base,
    }
    content = {"base": base, "deltas": deltas, "weights": weights, **results}
    print(json.dumps({name: value.tolist() for name, value in content.items()}))


main()
