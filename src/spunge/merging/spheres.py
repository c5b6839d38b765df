"""Rules that merge along spheres. What they give is a combination of the models; its coefficients follow from their inner products.

    spunge merge --base B --model M1 --model M2 --model M3 --rule karcher --out OUT

The inner products of a whole tensor are sums over its chunks, so that none of these rules needs the tensor in memory.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, Statistic, Sums, rule
from spunge.merging.rules import NAME, running_sum
from spunge.recipe.merging import RuleSettings

Points = Literal["models", "deltas"]
POINTS = "What lies on the sphere: the models' own weights, or their differences from the base."
By = Literal["tensor", "row"]
BY = "What is one vector: the whole tensor, or each of its rows (along the last dimension)."
SMALL = 1e-8
# A sum of unit vectors that is no longer counts as 0, and an angle whose sine is no larger as none or a straight one: what lies
# below is the rounding of the models' own values, and the order in which it was added up.
CANCELLED = 1e-4


def points(deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    base = chunk.base if settings.of == "models" else None
    return deltas if base is None else deltas + base


def _pairs(rows: Tensor) -> Tensor:  # (k, n) -> (k * k, 1) float64: a chunk's inner products
    wide = rows.double()
    return (wide @ wide.T).reshape(-1, 1)


def _products_of_points(deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:
    return _pairs(points(deltas, settings, chunk))


def _products_of_deltas(deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:
    return _pairs(deltas)


def gram(chunk: Chunk, k: int) -> Tensor:  # (k, k) float64, inner products over the whole tensor
    return chunk.facts["products"].double().reshape(k, k)


def merged(rows: Tensor, coefficients: Tensor, settings: Any, chunk: Chunk) -> Tensor:  # (k, n), (k,) -> (n,)
    """The delta that takes the base to a combination of points."""
    return from_base(running_sum(rows * coefficients.to(rows).unsqueeze(1)), settings, chunk)


def from_base(point: Tensor, settings: Any, chunk: Chunk) -> Tensor:
    """The delta that takes the base to a point."""
    return point - chunk.base if settings.of == "models" and chunk.base is not None else point


def length_of(coefficients: Tensor, products: Tensor) -> float:
    """Of a combination of points with these inner products."""
    return math.sqrt(max(0.0, float(coefficients @ products @ coefficients)))


class KarcherSettings(RuleSettings):
    rule: str = Field("karcher", description=NAME)
    of: Points = Field("models", description=POINTS)
    tries: int = Field(100, ge=1, description="Most steps towards the mean.")
    tolerance: float = Field(1e-9, gt=0, description="Length of a step, in radians, below which the mean is reached.")


def _statistics_of_points(settings: Any, k: int) -> Sequence[Statistic]:
    return (Sums("products", _products_of_points),)


@rule(
    source="Karcher 1977; mergekit's `karcher`, arXiv:2603.04972",
    statistics=_statistics_of_points,
    weighting=lambda settings: "shares",
)
def karcher(deltas: Tensor, settings: KarcherSettings, chunk: Chunk) -> Tensor:
    """Weighted mean of the models' directions on the sphere, with the weighted mean of their lengths, tensor by tensor."""
    rows = points(deltas, settings, chunk)
    products = gram(chunk, len(rows))
    shares = chunk.weights.double().cpu() / chunk.weights.double().sum().cpu()
    lengths = products.diagonal().sqrt().cpu()
    length = float((shares * lengths).sum())
    coefficients = mean_direction(products.cpu(), shares, settings.tries, settings.tolerance)
    return merged(rows, coefficients * length, settings, chunk)


def mean_direction(products: Tensor, shares: Tensor, tries: int, tolerance: float) -> Tensor:
    """Coefficients (k,) of the unit vector that is the Karcher mean of k points with these inner products (k, k), float64.

    A point of length 0 has no direction and takes no part. With none left all are 0.
    """
    lengths = products.diagonal().sqrt()
    has = lengths > 0
    if not bool(has.any()):
        return torch.zeros_like(lengths)
    inverse = torch.where(has, 1 / lengths.masked_fill(~has, 1.0), 0.0)
    cosines = (products * inverse.unsqueeze(0) * inverse.unsqueeze(1)).clamp(-1, 1)
    shares = shares * has / (shares * has).sum().clamp(min=torch.finfo(torch.float64).tiny)
    mean = _unit(shares, cosines)
    if mean is None:  # they cancel: begin at the first that has a direction
        mean = torch.zeros_like(shares)
        mean[int(has.nonzero()[0])] = 1.0
    for _ in range(tries):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = torch.arccos(dots)
        pull = shares * torch.where(angles < 1e-12, 1.0, angles / torch.sin(angles).clamp(min=1e-12))
        pull = pull.masked_fill((dots < 0) & (torch.sin(angles) <= CANCELLED), 0.0)  # what lies opposite pulls nowhere
        step = pull - (pull * dots).sum() * mean  # sum of pull * (unit - dot * mean)
        size = length_of(step, cosines)
        if size < tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        length = length_of(mean, cosines)
        mean = mean / length if length > SMALL else mean
    return mean * inverse


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """The combination of unit vectors made one of length 1; None where they cancel."""
    length = length_of(coefficients, cosines)
    return coefficients / length if length > CANCELLED else None


class MultislerpSettings(RuleSettings):
    rule: str = Field("multislerp", description=NAME)
    of: Points = Field("deltas", description=POINTS)


@rule(
    source="mergekit's `multislerp` (goddard.blog/posts/multislerp-wow-what-a-cool-idea)",
    statistics=_statistics_of_points,
    weighting=lambda settings: "sum",
)
def multislerp(deltas: Tensor, settings: MultislerpSettings, chunk: Chunk) -> Tensor:
    """One step of the mean on the sphere, from the direction of the weighted sum; where they cancel, the weighted mean."""
    rows = points(deltas, settings, chunk)
    weights = chunk.weights.double().cpu() / chunk.weights.double().sum().cpu()
    if len(rows) == 1:
        return merged(rows, weights, settings, chunk)
    products = gram(chunk, len(rows)).cpu()
    lengths = products.diagonal().sqrt()
    inverse = 1 / (lengths + SMALL)
    cosines = products * inverse.unsqueeze(0) * inverse.unsqueeze(1)
    mean = _unit(weights, cosines)
    if mean is None:
        return merged(rows, weights, settings, chunk)
    dots = cosines @ mean
    tangent = weights - (weights * dots).sum() * mean
    size = length_of(tangent, cosines) + SMALL
    unit = math.cos(size) * mean + math.sin(size) / size * tangent
    return merged(rows, unit * inverse * float((weights * lengths).sum()), settings, chunk)


class NuslerpSettings(RuleSettings):
    rule: str = Field("nuslerp", description=NAME)
    of: Points = Field("deltas", description=POINTS)
    by: By = Field("tensor", description=BY)


def _nuslerp_statistics(settings: NuslerpSettings, k: int) -> Sequence[Statistic]:
    return _statistics_of_points(settings, k) if settings.by == "tensor" else ()


@rule(
    source="Shoemake 1985; mergekit's `nuslerp`",
    statistics=_nuslerp_statistics,
    branches=(2, 2),
    whole_rows=True,
    weighting=lambda settings: "sum",
)
def nuslerp(deltas: Tensor, settings: NuslerpSettings, chunk: Chunk) -> Tensor:
    """Go from one of two models to the other along the sphere, as far as the second's share of the weights."""
    rows = points(deltas, settings, chunk)
    weights = chunk.weights.double()
    t = float(weights[1] / weights.sum())
    if settings.by == "tensor":
        products = gram(chunk, 2)
        cosine = products[0, 1] / (products[0, 0] * products[1, 1]).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return merged(rows, _along(cosine.clamp(-1, 1), t), settings, chunk)
    ends = rows.reshape(2, -1, chunk.columns).double()
    lengths = torch.linalg.vector_norm(ends, dim=-1)
    cosines = (ends[0] * ends[1]).sum(-1) / (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float64).tiny)
    first, second = _along(cosines.clamp(-1, 1), t)
    total: Tensor = (ends[0] * first.unsqueeze(-1) + ends[1] * second.unsqueeze(-1)).reshape(-1).to(rows)
    return from_base(total, settings, chunk)


def _along(cosines: Tensor, t: float) -> Tensor:  # (...) -> (2, ...), the coefficients of the two ends
    """sin((1 - t) a) / sin a and sin(t a) / sin a; a straight line where sin a vanishes."""
    straight = 1 - cosines.square() <= CANCELLED**2
    angle = torch.acos(cosines.masked_fill(straight, 0.0))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return torch.stack([first, second])


class ModelStockSettings(RuleSettings):
    rule: str = Field("model_stock", description=NAME)
    by: By = Field("tensor", description=BY)


def _model_stock_statistics(settings: ModelStockSettings, k: int) -> Sequence[Statistic]:
    return (Sums("products", _products_of_deltas),) if settings.by == "tensor" else ()


@rule(
    source="Jang et al. 2024 (Model Stock), arXiv:2403.19522, eq. 6",
    statistics=_model_stock_statistics,
    branches=(2, None),
    whole_rows=True,
    weighting=lambda settings: "none",
)
def model_stock(deltas: Tensor, settings: ModelStockSettings, chunk: Chunk) -> Tensor:
    """The mean of the branches, drawn back to the base the more, the less they agree in direction."""
    k = len(deltas)
    mean = running_sum(deltas) / k
    if settings.by == "tensor":
        return mean * float(drawn_back(gram(chunk, k)))
    rows = deltas.reshape(k, -1, chunk.columns).double()
    products = torch.einsum("irc,jrc->rij", rows, rows)
    return (mean.reshape(-1, chunk.columns) * drawn_back(products).unsqueeze(-1).to(mean)).reshape(-1)


def drawn_back(products: Tensor) -> Tensor:  # (..., k, k) -> (...)
    """k cos / (1 + (k - 1) cos), with the mean cosine over pairs; 0 where that has no finite value. A zero agrees with none."""
    k = products.shape[-1]
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    both = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    cosines = torch.where(both > 0, products / both.masked_fill(both == 0, 1.0), 0.0).clamp(-1, 1)
    above = torch.triu(torch.ones(k, k, dtype=torch.bool, device=products.device), diagonal=1)
    cosine = cosines[..., above].mean(-1)
    divisor = 1 + (k - 1) * cosine
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0.0, k * cosine / divisor.masked_fill(singular, 1.0))
