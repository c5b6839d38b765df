"""The merge rules: pure functions on stacked deltas, (k, n) -> (n,), in float32, on any torch device.

Sums over branches run in a fixed order, one branch after the other, so that every implementation rounds alike.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from spunge.merging.rule import Chunk, Cut, Scope, Statistic, Sums, Weighting, magnitude, rule
from spunge.recipe.merging import RuleSettings

Share = Annotated[float, Field(gt=0, le=1)]
NAME = "Name of the merge rule (`spunge list rules`)."
SCALE = "λ: the merged delta is multiplied by this."
DENSITY = "Share of entries kept per branch, by magnitude; a list gives one per branch."
KEPT = "Share of entries kept per branch, at random; a list gives one per branch."
SCOPE = "What the share is counted over: all tensors that any branch changed, the whole model, or each tensor."
SEED = "Seed of the random choice; it also depends on each branch's content, never on the branches' order."
NORMALIZE = "Divide by the sum of the weights that took part, as a mean does."


def running_sum(rows: Tensor) -> Tensor:  # (k, n) -> (n,)
    """Branch after branch: torch's own sum may reorder, and float addition is not associative."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def shares(value: float | Sequence[float], k: int) -> tuple[float, ...]:
    """A setting given once, or per branch, as one per branch."""
    return (float(value),) * k if isinstance(value, int | float) else tuple(value)


def weighted(deltas: Tensor, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    return deltas * chunk.weights.unsqueeze(1)


def keep_largest(deltas: Tensor, settings: object, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    """Zero what lies below each branch's threshold; every entry at the threshold stays."""
    return deltas.masked_fill(deltas.abs() < chunk.facts["cut"].unsqueeze(1), 0.0)


def elected_signs(deltas: Tensor, at_zero: Tensor | float = 1.0) -> Tensor:  # (k, n) -> (n,), each -1 or +1
    """Sum before sign: one large entry outvotes many small ones. `at_zero` where the sum is exactly zero."""
    total = running_sum(deltas)
    return torch.where(total == 0, torch.as_tensor(at_zero).to(total), torch.sign(total))


def sum_of_agreeing(deltas: Tensor, weights: Tensor, signs: Tensor, normalize: bool) -> Tensor:  # (k, n) -> (n,)
    """Weighted sum, or mean, over the branches whose weighted entry has the elected sign; 0 where none has."""
    parts = deltas * weights.unsqueeze(1)
    agrees = (parts * signs > 0).to(parts.dtype)
    total = running_sum(parts * agrees)
    if not normalize:
        return total
    share = running_sum(agrees * weights.unsqueeze(1))
    return (total / share).masked_fill(share == 0, 0.0)


def linear_sum(deltas: Tensor, chunk: Chunk, normalize: bool) -> Tensor:  # (k, n) -> (n,)
    """Weighted sum, or mean: then the weights' sum must not be 0."""
    total = running_sum(weighted(deltas, chunk))
    return total / running_sum(chunk.weights) if normalize else total


class TiesSettings(RuleSettings):
    rule: str = Field("ties", description=NAME)
    density: Share | list[Share] = Field(0.2, description=DENSITY)
    scale: float = Field(1.0, description=SCALE)
    scope: Scope = Field("changed", description=SCOPE)
    tie: Literal["plus", "majority"] = Field(
        "plus", description="Sign where the sum is exactly zero: +, or the one most entries have (the original code)."
    )


def _ties_statistics(settings: TiesSettings, k: int) -> Sequence[Statistic]:
    cut = Cut("cut", shares(settings.density, k), magnitude)
    return (cut,) if settings.tie == "plus" else (cut, Sums("majority", _votes))


def _votes(deltas: Tensor, settings: TiesSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (1, n)
    kept = keep_largest(deltas, settings, chunk)
    return elected_signs(weighted(kept, chunk), 0.0).unsqueeze(0)


@rule(
    source="Yadav et al. 2023, arXiv:2306.01708",
    trim=keep_largest,
    statistics=_ties_statistics,
    scope=lambda settings: settings.scope,
    weighting=lambda settings: "agreeing",
)
def ties(deltas: Tensor, settings: TiesSettings, chunk: Chunk) -> Tensor:
    """Trim each branch to its largest entries, elect a sign per entry, average the branches that agree with it."""
    signs = _elected(deltas, settings, chunk)
    return settings.scale * sum_of_agreeing(deltas, chunk.weights, signs, normalize=True)


def _elected(deltas: Tensor, settings: TiesSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (n,), each -1 or +1
    at_zero: Tensor | float = 1.0
    if settings.tie == "majority":
        at_zero = torch.where(chunk.facts["majority"] < 0, -1.0, 1.0)
    return elected_signs(weighted(deltas, chunk), at_zero)


class TiesNormSettings(TiesSettings):
    rule: str = Field("ties_norm", description=NAME)
    density: Share | list[Share] = Field(0.5, description=DENSITY)
    power: Annotated[float, Field(ge=1)] | Literal["max"] = Field(
        2.0,
        description="p of the norm over the branches that agree: 1 adds them; 2 is the root of the sum of squares; max takes the "
        "largest alone.",
    )


@rule(
    source="spunge: TIES (Yadav et al. 2023, arXiv:2306.01708) with a norm in place of the mean",
    trim=keep_largest,
    statistics=_ties_statistics,
    scope=lambda settings: settings.scope,
)
def ties_norm(deltas: Tensor, settings: TiesNormSettings, chunk: Chunk) -> Tensor:
    """Trim and elect as TIES does; the branches that agree give their p-norm, so that many small ones dilute no large one.

    TIES's mean divides by all that agree: of k branches, what one alone holds is shrunk by up to k, what all hold stays. A sum
    leaves what one holds and multiplies what all hold by k. With p between 1 and infinity what one holds is left as it is and
    what all hold grows by k^(1/p).
    """
    signs = _elected(deltas, settings, chunk)
    agreeing = (weighted(deltas, chunk) * signs).clamp(min=0)
    largest = agreeing.amax(dim=0)
    if settings.power == "max":
        norm = largest
    else:
        shares = agreeing / largest.clamp(min=torch.finfo(largest.dtype).tiny)
        norm = largest * running_sum(shares**settings.power) ** (1 / settings.power)
    return settings.scale * norm * signs


class TaskArithmeticSettings(RuleSettings):
    rule: str = Field("task_arithmetic", description=NAME)
    scale: float = Field(1.0, description=SCALE)


@rule(source="Ilharco et al. 2023, arXiv:2212.04089")
def task_arithmetic(deltas: Tensor, settings: TaskArithmeticSettings, chunk: Chunk) -> Tensor:
    """Add the branches, each times its weight."""
    return settings.scale * linear_sum(deltas, chunk, normalize=False)


class AverageSettings(RuleSettings):
    rule: str = Field("average", description=NAME)
    scale: float = Field(1.0, description=SCALE)


@rule(
    source="Wortsman et al. 2022 (model soups), arXiv:2203.05482; mergekit's `linear`",
    weighting=lambda settings: "sum",
)
def average(deltas: Tensor, settings: AverageSettings, chunk: Chunk) -> Tensor:
    """Weighted mean of the branches."""
    return settings.scale * linear_sum(deltas, chunk, normalize=True)


class WeightedSumSettings(RuleSettings):
    rule: str = Field("weighted_sum", description=NAME)


@rule(source="mergekit's `linear` with normalize: false", every_tensor=True)
def weighted_sum(deltas: Tensor, settings: WeightedSumSettings, chunk: Chunk) -> Tensor:
    """Add the models themselves, each times its weight, with no base in the sum: weights should sum to about 1."""
    # sum of w * (base + delta) - base: the base's own share is what the weights' sum lacks of 1, or has beyond it.
    beyond = float(chunk.weights.double().sum()) - 1
    total = linear_sum(deltas, chunk, normalize=False)
    return total if chunk.base is None else total + beyond * chunk.base


class DareSettings(RuleSettings):
    rule: str = Field("dare_linear", description=NAME)
    density: Share | list[Share] = Field(0.5, description=KEPT)
    scale: float = Field(1.0, description=SCALE)
    normalize: bool = Field(False, description=NORMALIZE)
    seed: int = Field(0, ge=0, description=SEED)


def drop_at_random(deltas: Tensor, settings: DareSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    """Keep each entry with probability `density` and divide it by that, so that its expectation stays."""
    density = chunk.per_branch(settings.density).unsqueeze(1)
    return (deltas / density).masked_fill(chunk.uniform(deltas, settings.seed) >= density, 0.0)


@rule(
    source="Yu et al. 2024 (DARE), arXiv:2311.03099",
    trim=drop_at_random,
    version=2,
    weighting=lambda settings: "sum" if settings.normalize else "any",
)
def dare_linear(deltas: Tensor, settings: DareSettings, chunk: Chunk) -> Tensor:
    """Drop entries at random, scale up the rest, add the branches."""
    return settings.scale * linear_sum(deltas, chunk, settings.normalize)


class DareTiesSettings(DareSettings):
    rule: str = Field("dare_ties", description=NAME)
    normalize: bool = Field(True, description=NORMALIZE)


def _by_normalize(settings: Any) -> Weighting:
    return "agreeing" if settings.normalize else "any"


@rule(
    source="Yu et al. 2024 (DARE), arXiv:2311.03099, with TIES's election",
    trim=drop_at_random,
    version=2,
    weighting=_by_normalize,
)
def dare_ties(deltas: Tensor, settings: DareTiesSettings, chunk: Chunk) -> Tensor:
    """Drop entries at random, scale up the rest, elect a sign per entry, merge the branches that agree with it."""
    signs = elected_signs(weighted(deltas, chunk))
    return settings.scale * sum_of_agreeing(deltas, chunk.weights, signs, settings.normalize)


class DellaSettings(RuleSettings):
    rule: str = Field("della", description=NAME)
    density: Share | list[Share] = Field(0.5, description="Mean share of entries kept; a list gives one per branch.")
    epsilon: float = Field(
        0.15,
        ge=0,
        lt=0.5,
        description="A row's smallest entry is kept with density - epsilon, its largest with + epsilon.",
    )
    scale: float = Field(1.0, description=SCALE)
    normalize: bool = Field(True, description=NORMALIZE)
    seed: int = Field(0, ge=0, description=SEED)


def drop_by_rank(deltas: Tensor, settings: DellaSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    """MagPrune: within each row of the tensor, the larger an entry, the likelier it stays; divided by its probability."""
    rows = deltas.reshape(deltas.shape[0], -1, chunk.columns)
    ranks = rows.abs().argsort(dim=2, stable=True).argsort(dim=2).to(deltas.dtype)
    spread = ranks / max(1, chunk.columns - 1) * 2 - 1
    density = chunk.per_branch(settings.density).reshape(-1, 1, 1)
    probability = (density + spread * settings.epsilon).clamp(1e-3, 1).masked_fill(density == 1, 1.0)
    probability = probability.reshape(deltas.shape)
    return (deltas / probability).masked_fill(chunk.uniform(deltas, settings.seed) >= probability, 0.0)


@rule(
    source="Deep et al. 2024 (DELLA), arXiv:2406.11617",
    trim=drop_by_rank,
    version=2,
    whole_rows=True,
    weighting=_by_normalize,
)
def della(deltas: Tensor, settings: DellaSettings, chunk: Chunk) -> Tensor:
    """Drop small entries likelier than large ones, scale up the rest, elect a sign per entry, merge those that agree."""
    signs = elected_signs(weighted(deltas, chunk))
    return settings.scale * sum_of_agreeing(deltas, chunk.weights, signs, settings.normalize)


class DellaLinearSettings(DellaSettings):
    rule: str = Field("della_linear", description=NAME)
    normalize: bool = Field(False, description=NORMALIZE)


@rule(
    source="Deep et al. 2024 (DELLA), arXiv:2406.11617, without the election",
    trim=drop_by_rank,
    whole_rows=True,
    weighting=lambda settings: "sum" if settings.normalize else "any",
)
def della_linear(deltas: Tensor, settings: DellaLinearSettings, chunk: Chunk) -> Tensor:
    """Drop small entries likelier than large ones, scale up the rest, add the branches."""
    return settings.scale * linear_sum(deltas, chunk, settings.normalize)


class BreadcrumbsSettings(RuleSettings):
    rule: str = Field("breadcrumbs", description=NAME)
    density: Share | list[Share] = Field(0.9, description=DENSITY)
    gamma: float = Field(0.01, ge=0, lt=1, description="Share of the very largest entries, which are dropped.")
    scale: float = Field(1.0, description=SCALE)
    scope: Scope = Field("tensor", description=SCOPE)


def _breadcrumbs_statistics(settings: BreadcrumbsSettings, k: int) -> Sequence[Statistic]:
    # Where density and gamma exceed 1 together, fewer outliers go: the density is what was asked for.
    kept = shares(settings.density, k)
    lower = Cut("cut", tuple(min(1.0, density + settings.gamma) for density in kept), magnitude)
    upper = Cut("outliers", tuple(min(settings.gamma, 1 - density) for density in kept), magnitude, least=0)
    return lower, upper


def keep_middle(deltas: Tensor, settings: BreadcrumbsSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    size = deltas.abs()
    too_large = size >= chunk.facts["outliers"].unsqueeze(1)
    return deltas.masked_fill((size < chunk.facts["cut"].unsqueeze(1)) | too_large, 0.0)


@rule(
    source="Davari & Belilovsky 2023, arXiv:2312.06795",
    trim=keep_middle,
    statistics=_breadcrumbs_statistics,
    scope=lambda settings: settings.scope,
)
def breadcrumbs(deltas: Tensor, settings: BreadcrumbsSettings, chunk: Chunk) -> Tensor:
    """Drop each branch's smallest entries and its few largest, add the branches."""
    return settings.scale * linear_sum(deltas, chunk, normalize=False)


class BreadcrumbsTiesSettings(BreadcrumbsSettings):
    rule: str = Field("breadcrumbs_ties", description=NAME)
    normalize: bool = Field(False, description=NORMALIZE)


@rule(
    source="Davari & Belilovsky 2023, arXiv:2312.06795, with TIES's election; mergekit's `breadcrumbs_ties`",
    trim=keep_middle,
    statistics=_breadcrumbs_statistics,
    scope=lambda settings: settings.scope,
    weighting=_by_normalize,
)
def breadcrumbs_ties(deltas: Tensor, settings: BreadcrumbsTiesSettings, chunk: Chunk) -> Tensor:
    """Drop each branch's smallest entries and its few largest, elect a sign per entry, merge the branches that agree with it."""
    signs = elected_signs(weighted(deltas, chunk))
    return settings.scale * sum_of_agreeing(deltas, chunk.weights, signs, settings.normalize)


class ConsensusSettings(RuleSettings):
    rule: str = Field("consensus", description=NAME)
    scale: float = Field(1.0, description=SCALE)


@rule(source="Kim et al. 2025 (NegMerge), arXiv:2410.05583", weighting=lambda settings: "sum")
def consensus(deltas: Tensor, settings: ConsensusSettings, chunk: Chunk) -> Tensor:
    """Weighted mean of the branches where every one of them has the same sign, zero elsewhere."""
    signs = torch.sign(weighted(deltas, chunk))
    unanimous = running_sum(signs).abs() == deltas.shape[0]
    return settings.scale * linear_sum(deltas, chunk, normalize=True).masked_fill(~unanimous, 0.0)


class SceSettings(RuleSettings):
    rule: str = Field("sce", description=NAME)
    density: Share = Field(0.1, description="Share of entries kept: those whose values differ most between branches.")
    scale: float = Field(1.0, description=SCALE)


def _variance(deltas: Tensor, settings: SceSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (1, n)
    return torch.var(deltas, dim=0, correction=0).unsqueeze(0)


def _differs(deltas: Tensor, settings: SceSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (1, n)
    return (_variance(deltas, settings, chunk) > 0).float()


def _energy(deltas: Tensor, settings: SceSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    return select_varied(deltas, settings, chunk).double().square()


def select_varied(deltas: Tensor, settings: SceSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    if settings.density == 1:
        return deltas
    return deltas.masked_fill(_variance(deltas, settings, chunk) < chunk.facts["cut"], 0.0)


def _sce_statistics(settings: SceSettings, k: int) -> Sequence[Statistic]:
    share = Cut("cut", (settings.density,), _variance, per_branch=False, least=0, population="differing")
    return Sums("differing", _differs), share, Sums("energy", _energy)


@rule(
    source="Wan et al. 2024 (FuseChat's SCE), arXiv:2408.07990",
    trim=select_varied,
    statistics=_sce_statistics,
    weighting=lambda settings: "shares",
)
def sce(deltas: Tensor, settings: SceSettings, chunk: Chunk) -> Tensor:
    """Select the entries that differ most, weigh each branch by its energy there, erase the minority's signs."""
    energy = chunk.facts["energy"].double() * chunk.weights
    share = energy / energy.sum() if bool(energy.sum() > 0) else torch.full_like(energy, 1 / len(energy))
    return settings.scale * sum_of_agreeing(deltas, share.to(deltas), elected_signs(deltas), normalize=True)


class SlerpSettings(RuleSettings):
    rule: str = Field("slerp", description=NAME)
    t: float = Field(0.5, ge=0, le=1, description="0 gives the first model (the base if one is given), 1 the second.")


def _ends(deltas: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The two models' own weights, in the user's order; the base and the model if there is one model."""
    base = torch.zeros_like(deltas[0]) if chunk.base is None else chunk.base
    if deltas.shape[0] == 1:
        return base, base + deltas[0]
    first, second = (1, 0) if chunk.order == (1, 0) else (0, 1)
    return base + deltas[first], base + deltas[second]


def _products(deltas: Tensor, settings: SlerpSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (3, n)
    a, b = (end.double() for end in _ends(deltas, chunk))
    return torch.stack([a * a, b * b, a * b])


def _slerp_statistics(settings: SlerpSettings, k: int) -> Sequence[Statistic]:
    return (Sums("products", _products),)


@rule(
    source="Shoemake 1985; mergekit's `slerp`",
    statistics=_slerp_statistics,
    branches=(1, 2),
    weighting=lambda settings: "none",
)
def slerp(deltas: Tensor, settings: SlerpSettings, chunk: Chunk) -> Tensor:
    """Go from one model's weights to another's along the sphere, tensor by tensor."""
    a, b = _ends(deltas, chunk)
    aa, bb, ab = chunk.facts["products"].tolist()
    t, cosine = settings.t, ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0
    if abs(cosine) > 0.9995:  # nearly parallel: a straight line, as sin θ vanishes
        merged = (1 - t) * a + t * b
    else:
        angle = math.acos(cosine)
        merged = math.sin((1 - t) * angle) / math.sin(angle) * a + math.sin(t * angle) / math.sin(angle) * b
    return merged if chunk.base is None else merged - chunk.base
