"""Rules that take over from one model what suits the base, entry by entry.

spunge merge --base B --model M --rule arcee_fusion --out OUT
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, Cut, Statistic, rule
from spunge.merging.rules import NAME
from spunge.recipe.merging import RuleSettings


class NearswapSettings(RuleSettings):
    rule: str = Field("nearswap", description=NAME)
    t: float = Field(1e-3, gt=0, description="Differences up to this are taken whole; larger ones become this large.")


@rule(
    source="mergekit's `nearswap` (alchemonaut/QuartetAnemoi-70B-t0.0001)",
    branches=(1, 1),
    weighting=lambda settings: "none",
)
def nearswap(deltas: Tensor, settings: NearswapSettings, chunk: Chunk) -> Tensor:
    """Take the model's entry where it is near the base's, and go at most t towards it elsewhere."""
    return deltas[0] * (settings.t / deltas[0].abs().clamp(min=1e-6)).clamp(max=1)


class ArceeFusionSettings(RuleSettings):
    rule: str = Field("arcee_fusion", description=NAME)


def importance(deltas: Tensor, settings: ArceeFusionSettings, chunk: Chunk) -> Tensor:  # (1, n) -> (1, n)
    """|difference| x KL(softmax of the model's row, softmax of the base's)."""
    base = torch.zeros_like(deltas[0]) if chunk.base is None else chunk.base
    old = base.reshape(-1, chunk.columns)
    new = (base + deltas[0]).reshape(-1, chunk.columns)
    p, q = (torch.softmax(rows, dim=-1) + 1e-8 for rows in (new, old))
    apart = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    return ((new - old).abs() * apart).reshape(1, -1)


def _quartiles(settings: ArceeFusionSettings, k: int) -> Sequence[Statistic]:
    return [
        Cut(name, (share,), importance, per_branch=False)
        for name, share in (("lower", 0.75), ("median", 0.5), ("upper", 0.25))
    ]


@rule(
    source="mergekit's `arcee_fusion` (arcee.ai)",
    statistics=_quartiles,
    branches=(1, 1),
    whole_rows=True,
    weighting=lambda settings: "none",
)
def arcee_fusion(deltas: Tensor, settings: ArceeFusionSettings, chunk: Chunk) -> Tensor:
    """Take over the entries whose importance exceeds the median by one and a half times the range of the quartiles.

    The quartiles are exact, where mergekit draws a million entries of a larger tensor.
    """
    lower, median, upper = (chunk.facts[name] for name in ("lower", "median", "upper"))
    least = median + 1.5 * (upper - lower)
    return deltas[0].masked_fill((importance(deltas, settings, chunk) < least)[0], 0.0)
