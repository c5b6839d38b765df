"""What an attack is: a value that holds its settings class and a function from a model and a target to measures.

    RELEARN = Attack(settings=RelearnSettings, source="Lynch et al. 2024, arXiv 2402.16835", run=run)

An audit does what attacks share: it finds the evaluation that is measured again, reads rows of the attack's own, and refuses
what does not fit. The model is left as it was, bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa

from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe
from spunge.registry import summary_of

S = TypeVar("S", bound=AttackSettings)


@dataclass(frozen=True)
class Attack(Generic[S]):
    """An attack. Lists say the first line of `run`'s docstring of it."""

    settings: type[S]
    source: str  # the paper
    run: Callable[[Base, S, Target, Bench], list[Measure]]
    of: bool = True  # it measures another evaluation again, which the audit's `of` names; False: rows of its own alone
    reads: frozenset[str] = frozenset()  # which of the audit's source, where, limit, by and subject it has a use for
    unseen: bool = False  # rows of its own must not be rows to forget
    rows: str = ""  # what the rows of its own are, where it reads some: `source` must be given unless `of` is
    # (settings, the forget set's text columns) -> role: column or SQL expression over the rows of its own.
    columns: Callable[[S, Mapping[str, str]], dict[str, str]] = lambda settings, forget: {}
    # (settings, rows of its own beside an evaluation's) -> what it measures with beyond the settings.
    instrument: Callable[[S, pa.Table | None], dict[str, Any]] = lambda settings, rows: {}
    # (settings, the evaluation that is measured again, recipe). Raises RecipeError where it cannot be, before anything is trained.
    check: Callable[[S, EvaluatorSettings | None, Recipe], None] = lambda settings, other, recipe: None
    whole: bool = False  # it reads or changes the weights themselves, and so needs them whole on one device
    version: int = 1  # rises when the same settings give other measurements

    @property
    def summary(self) -> str:
        return summary_of(self.run)
