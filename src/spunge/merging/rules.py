"""The merge rules: pure functions on stacked deltas, (k, n) -> (n,), in float32, on any torch device.

Sums over branches run in a fixed order, one branch after the other, so that every implementation rounds alike.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, Cut, Scope, Statistic, Sums, rule
from spunge.recipe import RuleSettings

Share = Annotated[float, Field(gt=0, le=1)]
SCALE = "λ: the merged delta is multiplied by this."
DENSITY = "Share of entries kept per branch, by magnitude; a list gives one per branch."
SCOPE = "What the share is counted over: all tensors that any branch changed, the whole model, or each tensor by itself."


def running_sum(rows: Tensor) -> Tensor:  # (k, n) -> (n,)
    """Branch after branch: torch's own sum may reorder, and float addition is not associative."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def magnitude(deltas: Tensor, settings: object, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    return deltas.abs()


def shares(value: float | Sequence[float], k: int) -> tuple[float, ...]:
    return (float(value),) * k if isinstance(value, int | float) else tuple(value)


def keep_largest(deltas: Tensor, settings: object, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    """Zero what lies below each branch's threshold; every entry at the threshold stays."""
    return torch.where(deltas.abs() >= chunk.facts["cut"].unsqueeze(1), deltas, 0.0)


def elected_signs(weighted: Tensor, at_zero: Tensor | float = 1.0) -> Tensor:  # (k, n) -> (n,), each -1 or +1
    """Sum before sign: one large entry outvotes many small ones. `at_zero` where the sum is exactly zero."""
    total = running_sum(weighted)
    signs = torch.sign(total)
    return torch.where(total == 0, torch.as_tensor(at_zero, dtype=signs.dtype, device=signs.device), signs)


def mean_of_agreeing(kept: Tensor, weights: Tensor, signs: Tensor) -> Tensor:  # (k, n), (k,), (n,) -> (n,)
    """Weighted mean over the branches whose entry has the elected sign; 0 where none has."""
    weighted = kept * weights.unsqueeze(1)
    agrees = weighted * signs > 0
    total = running_sum(torch.where(agrees, weighted, 0.0))
    share = running_sum(agrees * weights.unsqueeze(1))
    return torch.where(share == 0, 0.0, total / share)


class TiesSettings(RuleSettings):
    rule: str = "ties"
    density: Share | list[Share] = Field(0.2, description=DENSITY)
    scale: float = Field(1.0, description=SCALE)
    scope: Scope = Field("changed", description=SCOPE)
    tie: Literal["plus", "majority"] = Field(
        "plus", description="Sign elected where the sum is exactly zero: +, or the one that most entries have (the original)."
    )


def _ties_statistics(settings: TiesSettings, k: int) -> Sequence[Statistic]:
    cut = Cut("cut", shares(settings.density, k), magnitude)
    return (cut,) if settings.tie == "plus" else (cut, Sums("majority", _votes))


def _votes(deltas: Tensor, settings: TiesSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (1, n)
    kept = keep_largest(deltas, settings, chunk)
    return elected_signs(kept * chunk.weights.unsqueeze(1), 0.0).unsqueeze(0)


@rule(source="Yadav et al. 2023, arXiv:2306.01708", trim=keep_largest, statistics=_ties_statistics)
def ties(deltas: Tensor, settings: TiesSettings, chunk: Chunk) -> Tensor:
    """Trim each branch to its largest entries, elect a sign per entry, average the branches that agree with it."""
    at_zero = torch.sign(chunk.facts["majority"]).float() if settings.tie == "majority" else 1.0
    signs = elected_signs(deltas * chunk.weights.unsqueeze(1), at_zero)
    return settings.scale * mean_of_agreeing(deltas, chunk.weights, signs)
