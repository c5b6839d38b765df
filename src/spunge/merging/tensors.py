"""Merge deltas that are in memory, each taken as one tensor."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spunge.merging.checks import check_weights
from spunge.merging.rule import Chunk, Rule
from spunge.merging.thresholds import facts_of


def merge_tensors(
    rule: Rule,
    deltas: Tensor,
    settings: Any,
    weights: Sequence[float] | None = None,
    moments: Sequence[Tensor] | None = None,
) -> Tensor:
    """Merge whole deltas held in memory: (k, ...) -> (...), each taken as one tensor (scope `tensor`).

    moments: each branch's, for a rule that needs them: of gradients in the delta's shape; of inputs (d, d), for the weight
    (outputs, d) of a linear layer, none for another tensor.
    """
    if (rule.moments is None) != (moments is None):
        raise ValueError(f"moments of {rule.moments or 'nothing'} are what the rule takes")
    if weights is not None:
        check_weights(rule, settings, weights)
    flat = deltas.reshape(deltas.shape[0], -1).float()
    chosen = (
        torch.ones(flat.shape[0], device=flat.device) if weights is None else torch.tensor(weights, device=flat.device)
    )
    own = [each.reshape(-1) for each in moments or ()]
    norms = [float(each.double().norm()) for each in own]
    chunk = Chunk(chosen.float(), columns=deltas.shape[-1], shape=tuple(deltas.shape[1:]), moments=own, norms=norms)
    chunk = replace(chunk, facts=facts_of(rule, flat, settings, chunk))
    return rule(flat, settings, chunk).reshape(deltas.shape[1:])
