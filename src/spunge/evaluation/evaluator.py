"""What an evaluator is: which columns it needs, and a function from a model and items to one measurement per item."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa

from spunge.models import Base
from spunge.recipe import EvaluatorSettings


@dataclass(frozen=True)
class Measure:
    """A metric as a ratio of sums over items: accuracy is right / 1, log-perplexity is negative log-likelihood / tokens."""

    metric: str
    numerator: np.ndarray  # (n,)
    denominator: np.ndarray  # (n,)
    higher_is_better: bool
    transform: Literal["none", "exp"] = "none"  # of the ratio


class Evaluator(Protocol):
    """`version` rises when the same settings give other measurements."""

    Settings: ClassVar[type[EvaluatorSettings]]
    version: ClassVar[int]

    @staticmethod
    def columns(settings: Any, forget: Mapping[str, str]) -> dict[str, str]:
        """Role -> column or SQL expression over the rows; `forget` holds the forget set's text columns, as a default."""
        ...

    @staticmethod
    def measure(base: Base, settings: Any, items: pa.Table, progress: Callable[[int, int], None]) -> list[Measure]:
        """Measure the model on every item (one row each, columns named by role). Raises RecipeError for unusable items."""
        ...
