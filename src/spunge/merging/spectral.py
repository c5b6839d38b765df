"""Rules that merge the singular vectors of whole matrices; other tensors get the mean.

    spunge merge --base B --model M1 --model M2 --rule tsv --out OUT

Each needs the deltas of a matrix in memory, and seconds to minutes for one of thousands by thousands. The papers' algorithms keep
also directions whose singular value is 0 (the deltas of LoRA have few others), whose vectors are whatever the routine returns;
here these are left out, so that the result is a function of the deltas.
"""

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, rule
from spunge.merging.rules import NAME, SCALE, linear_sum, running_sum, weighted
from spunge.recipe.merging import RuleSettings


class Singular:
    """The part of a matrix's singular value decomposition with values above what rounding leaves, largest first."""

    def __init__(self, matrix: Tensor) -> None:  # (m, n)
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        least = float(values[0]) * max(matrix.shape) * torch.finfo(torch.float32).eps if len(values) else 0.0
        rank = int((values > least).sum())
        self.left, self.values, self.right = left[:, :rank], values[:rank], right[:rank]


def matrices(row: Tensor, chunk: Chunk) -> Tensor | None:
    """A flat tensor as a stack of matrices, (count, m, n); None for a vector."""
    return row.reshape(-1, *chunk.shape[-2:]) if len(chunk.shape) > 1 else None


class TsvSettings(RuleSettings):
    rule: str = Field("tsv", description=NAME)
    share: float | None = Field(
        None, gt=0, le=1, description="Share of a matrix's singular values kept per branch. Default: 1 / branches."
    )
    scale: float = Field(1.0, description=SCALE)


@rule(
    source="Gargiulo et al. 2025 (task singular vectors), arXiv:2412.00081, algorithm 1",
    whole_tensors=True,
    weighting=lambda settings: "sum",
)
def tsv(deltas: Tensor, settings: TsvSettings, chunk: Chunk) -> Tensor:
    """Keep each branch's largest singular values, make the kept vectors of all branches orthogonal, add up."""
    if matrices(deltas[0], chunk) is None:
        return settings.scale * linear_sum(deltas, chunk, normalize=True)
    share = settings.share or 1 / len(deltas)
    stacks = [matrices(row, chunk) for row in weighted(deltas, chunk)]
    merged = [orthogonal_sum([Singular(matrix) for matrix in each], share) for each in zip(*stacks, strict=True)]
    return settings.scale * torch.stack(merged).reshape(-1).to(deltas)


def orthogonal_sum(parts: list[Singular], share: float) -> Tensor:  # -> (m, n) float64
    """The sum of the parts' largest singular triplets, with the nearest orthonormal vectors in place of theirs."""
    most = int(share * min(parts[0].left.shape[0], parts[0].right.shape[1])) or 1
    left = torch.cat([part.left[:, :most] for part in parts], dim=1)
    right = torch.cat([part.right[:most] for part in parts], dim=0)
    values = torch.cat([part.values[:most] for part in parts])
    total: Tensor = (nearest_orthonormal(left) * values) @ nearest_orthonormal(right)
    return total


def nearest_orthonormal(vectors: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition. Vectors that depend on each other span no more directions than they did:
    a direction two branches share stays one."""
    part = Singular(vectors)
    factor: Tensor = part.left @ part.right
    return factor


class IsoSettings(RuleSettings):
    rule: str = Field("iso_c", description=NAME)
    scale: float = Field(1.0, description=SCALE)


@rule(source="Marczak et al. 2025 (Iso-C), arXiv:2502.04959, algorithm 1", whole_tensors=True)
def iso_c(deltas: Tensor, settings: IsoSettings, chunk: Chunk) -> Tensor:
    """Add the branches and give all directions of the sum the mean of its singular values."""
    total = running_sum(weighted(deltas, chunk))
    stack = matrices(total, chunk)
    if stack is None:
        return settings.scale * total / len(deltas)
    return settings.scale * torch.stack([level(Singular(matrix)) for matrix in stack]).reshape(-1).to(deltas)


def level(part: Singular) -> Tensor:  # -> (m, n) float64
    directions: Tensor = part.left @ part.right
    return part.values.mean() * directions if len(part.values) else directions
