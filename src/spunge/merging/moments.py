"""Rules that weigh branches by what each does on its own rows: by Fisher's diagonal, or by regression on layers' inputs.

    merge: {rule: fisher}
    merge: {rule: regmean, alpha: 0.9}

Both are defined on whole models: theta_i = base + delta_i. Their weights sum to one (to the identity), so that the base's own
term is the base, and the same formula on the deltas gives the same model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, rule
from spunge.merging.rules import NAME, SCALE, linear_sum
from spunge.recipe.block import Strict
from spunge.recipe.merging import RuleSettings

ROWS = "Rows of each part that they are taken on, evenly spread over it; all where it has fewer."
LENGTH = "Tokens of a row, at most."


class GradientMoments(Strict):
    """How Fisher's diagonal is taken."""

    rows: int = Field(256, ge=1, description=ROWS)
    max_length: int = Field(512, ge=2, description=LENGTH)
    labels: Literal["sampled", "own"] = Field(
        "sampled",
        description="Whose log-likelihood: of tokens that the branch model draws in place of the learned ones (Fisher's own), or "
        "of the rows' own (the empirical Fisher).",
    )


class FisherSettings(RuleSettings):
    rule: str = Field("fisher", description=NAME)
    normalize: bool = Field(
        True, description="Divide each branch's diagonal by its norm over all tensors, as the authors' code does."
    )
    floor: float = Field(
        0.0,
        ge=0,
        description="Least value of a diagonal's entry, before it is divided. The authors' code takes 1e-6, for classifiers. Where "
        "all branches have 0, their mean is taken.",
    )
    moments: GradientMoments = Field(default_factory=GradientMoments, description="How the diagonals are taken.")
    scale: float = Field(1.0, description=SCALE)


@rule(
    source="Matena & Raffel 2022 (Fisher merging), arXiv:2111.09832, section 3",
    weighting=lambda settings: "shares",
    moments="gradients",
)
def fisher(deltas: Tensor, settings: FisherSettings, chunk: Chunk) -> Tensor:
    """Average the branches entry by entry, each weighed by its Fisher diagonal on its own rows."""
    total, weight = (torch.zeros(deltas.shape[1], dtype=torch.float64, device=deltas.device) for _ in range(2))
    for place, row in enumerate(deltas):
        norm = chunk.norms[place] if settings.normalize else 1.0
        own = chunk.moments[place].double().clamp(min=settings.floor) * (float(chunk.weights[place]) / (norm or 1.0))
        total += own * row
        weight += own
    merged = torch.where(weight > 0, total / weight, linear_sum(deltas, chunk, normalize=True).double())
    return (settings.scale * merged).to(deltas)


class InputMoments(Strict):
    """How the inputs' moments are taken."""

    rows: int = Field(1000, ge=1, description=ROWS)
    max_length: int = Field(512, ge=2, description=LENGTH)


class RegmeanSettings(RuleSettings):
    rule: str = Field("regmean", description=NAME)
    alpha: float = Field(
        0.9, ge=0, le=1, description="What the entries off the diagonal of each branch's moments are multiplied by."
    )
    moments: InputMoments = Field(default_factory=InputMoments, description="How the moments are taken.")
    scale: float = Field(1.0, description=SCALE)


@rule(
    source="Jin et al. 2023 (RegMean), arXiv:2212.09849, equation 2 and section 4",
    whole_tensors=True,
    weighting=lambda settings: "shares",
    moments="inputs",
)
def regmean(deltas: Tensor, settings: RegmeanSettings, chunk: Chunk) -> Tensor:
    """Merge each linear layer so that its outputs are nearest to every branch's on that branch's own inputs; average the rest.

    In directions that no branch's inputs have, where any weight fits, it is the mean.
    """
    mean = linear_sum(deltas, chunk, normalize=True)
    if (
        not chunk.moments or chunk.shape[0] == -1
    ):  # rows alone, looked at to choose how they are rounded: the mean is near
        return settings.scale * mean

    def turned(flat: Tensor) -> Tensor:  # (n,) -> (outputs, inputs) float64
        matrix = flat.reshape(chunk.shape).double()
        return matrix if chunk.axis == 1 else matrix.T

    middle = turned(mean)
    inputs = middle.shape[1]
    total = torch.zeros(inputs, inputs, dtype=torch.float64, device=deltas.device)
    apart = torch.zeros_like(middle)
    for row, moments, weight in zip(deltas, chunk.moments, chunk.weights, strict=True):
        own = moments.reshape(inputs, inputs).to(deltas.device).double()
        own = torch.where(torch.eye(inputs, dtype=torch.bool, device=deltas.device), own, settings.alpha * own)
        own *= float(weight)
        total += own
        apart += (turned(row) - middle) @ own
    merged = middle + solved(total, apart)
    return (settings.scale * (merged if chunk.axis == 1 else merged.T)).reshape(-1).to(deltas)


def solved(moments: Tensor, sums: Tensor) -> Tensor:  # (d, d), (m, d) -> (m, d)
    """sums @ moments^-1, float64; the pseudo-inverse where some direction has less than float32 resolves."""
    least = torch.finfo(torch.float32).eps * len(moments) * float(moments.diagonal().amax())
    factor, failed = torch.linalg.cholesky_ex(moments)
    if not failed and float(factor.diagonal().square().amin()) > least:
        return torch.cholesky_solve(sums.T, factor).T
    values, vectors = torch.linalg.eigh(moments)
    inverse = torch.where(values > least, 1 / values, 0.0)
    result: Tensor = ((sums @ vectors) * inverse) @ vectors.T
    return result


def taking(settings: RuleSettings) -> dict[str, Any]:
    """How a rule's moments are taken, as their key and their files' names have it."""
    taken: dict[str, Any] = dict(settings)["moments"].model_dump(mode="json")
    return taken
