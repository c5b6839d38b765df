"""What a merge rule is: one function on the branches' stacked deltas, with its settings.

    @rule(source="arXiv:0000.00000")
    def median(deltas: Tensor, settings: MedianSettings, chunk: Chunk) -> Tensor:  # (k, n) -> (n,)
        \"\"\"Entry by entry, the median of the branches.\"\"\"
        return settings.scale * deltas.median(dim=0).values

A rule may first `trim` the deltas (drop entries), and may ask for facts about whole tensors that no chunk can tell:
exact magnitude thresholds (`Cut`) and sums (`Sums`), each found by one or more passes over the data before the merge.
Functions here and in `rules` see a chunk of one tensor at a time, in float32, on any torch device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from spunge.recipe.merging import RuleSettings
from spunge.registry import summary_of
from spunge.weights.moments import Kind
from spunge.weights.rounding import hashed, seed_of, wrapped

Scope = Literal["changed", "model", "tensor"]

# What a rule does with the models' weights: `any` serve it; `sum`: it divides by their sum, which must not be 0;
# `agreeing`: it divides by the sum of those that agree, entry by entry; `shares`: none may be negative; `none`: it reads none.
Weighting = Literal["any", "sum", "agreeing", "shares", "none"]


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies, and what is known about the tensor it belongs to. k branches, n entries."""

    weights: Tensor  # (k,) float32
    name: str = ""  # the tensor's, which seeds what is drawn
    start: int = 0  # index of the chunk's first entry in the flattened tensor
    columns: int = 1  # length of the tensor's rows (its last dimension)
    shape: tuple[int, ...] = ()  # the tensor's, for rules that take whole tensors
    seeds: tuple[int, ...] = ()  # one per branch, from its content: random rules must not depend on the branches' order
    order: tuple[int, ...] = ()  # place of each branch in the user's list, for settings given per branch
    base: Tensor | None = None  # (n,) float32, the base's values
    facts: Mapping[str, Tensor] = field(default_factory=dict)  # results of the rule's statistics
    # Of a rule with moments: each branch's, flat, of gradients (n,), of inputs (d * d,); none for what is no linear layer's.
    moments: Sequence[Tensor] = ()
    norms: Sequence[float] = ()  # of gradients: of each branch's moments over all its tensors
    axis: int = 1  # of inputs: the tensor's dimension along which they lie

    def per_branch(self, value: float | Sequence[float]) -> Tensor:
        """A setting as (k,): the same for all branches, or one for each in the user's order."""
        if isinstance(value, int | float):
            return torch.full_like(self.weights, value)
        order = self.order or range(len(value))
        return torch.tensor([value[place] for place in order], dtype=torch.float32, device=self.weights.device)

    def uniform(self, deltas: Tensor, seed: int = 0) -> Tensor:
        """(k, n) numbers in [0, 1): the same for the same branch, tensor, entry and seed, however the work is cut up."""
        index = torch.arange(self.start, self.start + deltas.shape[1], device=deltas.device) + seed_of(self.name)
        seeds = self.seeds or tuple(range(deltas.shape[0]))
        rows = [hashed(index + wrapped(branch * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03)) for branch in seeds]
        return torch.stack([(row & 0xFFFFFF).float() / 0x1000000 for row in rows])


Measure = Callable[[Tensor, Any, Chunk], Tensor]


def magnitude(deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:  # (k, n) -> (k, n)
    return deltas.abs()


@dataclass(frozen=True)
class Cut:
    """The exact value that the `share` largest entries of each row of `measure` (>= 0) reach; ties all reach it.

    The fact is a tensor (rows,): keep `measure >= fact`. A share of 1 keeps all; one of 0, or too small for a single
    entry where `least` is 0, gives inf: nothing reaches it.
    """

    name: str
    shares: tuple[float, ...]  # one per row of the measure; in the user's order of branches if there is one per branch
    measure: Measure  # (k, n) -> (rows, n)
    per_branch: bool = True
    least: int = 1  # entries that any share above 0 keeps at least
    population: str | None = None  # a `Sums` fact before this one: how many entries shares count. Default: all


@dataclass(frozen=True)
class Sums:
    """The sum of each row of `measure` over the scope; the fact is a float64 tensor (rows,)."""

    name: str
    measure: Measure  # (k, n) -> (rows, n)


Statistic = Cut | Sums
Trim = Callable[[Tensor, Any, Chunk], Tensor]


@dataclass(frozen=True)
class Rule:
    """A merge rule. Calling it merges one chunk: (k, n) -> (n,). Lists say the first line of `combine`'s docstring of it."""

    combine: Callable[[Tensor, Any, Chunk], Tensor]
    settings: type[RuleSettings]
    source: str
    trim: Trim | None = None
    statistics: Callable[[Any, int], Sequence[Statistic]] | None = None  # (settings, k)
    scope: Callable[[Any], Scope] = lambda settings: "tensor"  # what statistics are counted over
    whole_rows: bool = False  # chunks must hold whole rows
    whole_tensors: bool = False  # a chunk must be a tensor
    branches: tuple[int, int | None] = (1, None)  # fewest and most
    version: int = 1  # rises when the same settings give another merge
    weighting: Callable[[Any], Weighting] = lambda settings: "any"  # what weights it can take
    every_tensor: bool = False  # also those that no model changed: its result is more than a combination of differences
    # Second moments of each branch on its own rows, which a run takes; then the settings say how, in a block `moments`.
    moments: Kind | None = None

    @property
    def summary(self) -> str:
        return summary_of(self.combine)

    def __call__(self, deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:
        return self.combine(self.trimmed(deltas, settings, chunk), settings, chunk)

    def trimmed(self, deltas: Tensor, settings: Any, chunk: Chunk) -> Tensor:
        return deltas if self.trim is None else self.trim(deltas, settings, chunk)

    def wanted(self, settings: Any, k: int) -> Sequence[Statistic]:
        return () if self.statistics is None else self.statistics(settings, k)


def rule(
    *,
    source: str,
    trim: Trim | None = None,
    statistics: Callable[[Any, int], Sequence[Statistic]] | None = None,
    scope: Callable[[Any], Scope] = lambda settings: "tensor",
    whole_rows: bool = False,
    whole_tensors: bool = False,
    branches: tuple[int, int | None] = (1, None),
    version: int = 1,
    weighting: Callable[[Any], Weighting] = lambda settings: "any",
    every_tensor: bool = False,
    moments: Kind | None = None,
) -> Callable[[Callable[[Tensor, Any, Chunk], Tensor]], Rule]:
    """Make a merge rule of a function (deltas, settings, chunk) -> merged; its settings class is read off its signature."""

    def build(combine: Callable[[Tensor, Any, Chunk], Tensor]) -> Rule:
        settings = get_type_hints(combine)["settings"]
        return Rule(
            combine,
            settings,
            source,
            trim,
            statistics,
            scope,
            whole_rows,
            whole_tensors,
            branches,
            version,
            weighting,
            every_tensor,
            moments,
        )

    return build
