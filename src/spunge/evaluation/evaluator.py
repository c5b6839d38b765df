"""What an evaluator is: a value that holds its settings class and a function from a model and items to measures per item."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from spunge.data.samples import Samples
from spunge.model.loading import Base
from spunge.progress import SILENT, Steps
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.rows import Source
from spunge.recipe.schema import Recipe
from spunge.recipe.training import Optimizer
from spunge.registry import summary_of
from spunge.results import Higher

T = TypeVar("T")
S = TypeVar("S", bound=EvaluatorSettings)


@dataclass(frozen=True)
class Measure:
    """A metric over items. As a ratio of sums: accuracy is right / 1, log-perplexity is negative log-likelihood / tokens.

    As `auroc`, numerator holds each item's score and denominator its class, 1 or 0: the chance that an item of class 1
    scores higher than one of class 0. As `detected`: the share of class 1 found where at most the share `false` of class 0 is
    taken for it.
    """

    metric: str
    numerator: np.ndarray  # (n,)
    denominator: np.ndarray  # (n,)
    higher: Higher  # what a higher value says: `known`, `unknown`, `good`, `bad`; None: none of these
    transform: Literal["none", "exp"] = "none"  # of the ratio
    combine: Literal["ratio", "auroc", "detected"] = "ratio"
    false: float | None = None  # of `detected`: the share of class 0 that may be taken for class 1
    subject: str | None = (
        None  # measured on this subject alone, whose items the arrays hold; None: on the evaluation's own
    )
    worst: bool = False  # the worst of the subjects is reported too: of what is known, the part that is forgotten least
    chance: float | None = None  # what guessing gives
    of: str | None = None  # the metric that this one measures again, after an attack
    side: bool = False  # a check on another metric: the report speaks of it only where it changed for certain
    attack: str | None = None  # the kind of attack that the model is under; an audit fills it in
    label: str | None = None  # what the recipe calls the attack
    curve: str | None = None  # the metric's name with N in place of `at`: the same for all points of a curve
    at: float | None = None  # where on the curve
    unit: str | None = None  # what `at` counts: `steps`, 0 of which leave the model as it is, `block` ...
    target: float | None = None  # what it should be near, where more and less of it are as bad, whatever the items are


@dataclass(frozen=True)
class Rated:
    """On which side of a threshold a scorer's scores fell."""

    threshold: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, scores: np.ndarray, threshold: float) -> "Rated":
        return cls(threshold, float(scores.min()), float(scores.max()), len(scores))


class Limits(NamedTuple):
    """What the model can read, known before its weights are loaded."""

    tokenizer: Any
    embeddings: int  # tokens that it has embeddings for
    positions: int | None  # tokens of a text; None: nothing bounds them


class Judges:
    """Other models that judge: each is loaded once, however many evaluations and stages ask for it."""

    def __init__(self) -> None:
        self._loaded: dict[Hashable, Any] = {}

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        if key not in self._loaded:
            self._loaded[key] = load()
        judge: T = self._loaded[key]
        return judge


class Finetune(Protocol):
    """Train LoRA factors, or all weights, on samples, call `pause(step)` at the given steps with the model as it is then, and undo
    it all.

    Step 0 is before the first. The model in memory is the very `base.model`.
    """

    def __call__(
        self,
        base: Base,
        samples: Samples,
        *,
        pauses: list[int],
        pause: Callable[[int], None],
        batch_size: int,
        learning_rate: float,
        max_length: int,
        seed: int,
        trainable: Literal["lora", "all"] = "lora",
        optimizer: Optimizer = "adamw",
    ) -> None: ...


@dataclass(frozen=True)
class Bench:
    """What an evaluator has at hand beside the model and its items."""

    stage: str  # base, branch:SLUG, control:NAME or merged
    model: str  # fingerprint of the model that is judged: what is kept for another must not be used
    folder: Path  # of this stage, to keep texts in and take them up again
    base_folder: Path  # the same of the base, which is judged first
    attacked: bool = False  # the model's weights are not the stage's own
    judges: Judges = field(default_factory=Judges)
    forget: Mapping[str, Samples] = field(default_factory=dict)  # attribute value -> the samples that are unlearned
    retain: Samples | None = None
    settings_of: Mapping[str, EvaluatorSettings] = field(default_factory=dict)  # of the recipe's evaluations, by name
    finetune: Finetune | None = None
    kept: set[Path] = field(
        default_factory=set
    )  # files in `folder` that the measurements rest on, told by the evaluator
    rated: list[Rated] = field(default_factory=list)  # what a scorer's scores were, told by the evaluator
    seed: int = 0
    progress: Steps = SILENT.step


@dataclass(frozen=True)
class Evaluator(Generic[S]):
    """An evaluator. The first line of `measure`'s docstring is what lists say of it."""

    settings: type[S]
    source: str  # the paper, or the package that measures
    # (model, settings, items, bench) -> measures over all items (one row each, columns named by role). The model is left as it
    # was. Raises RecipeError for items that cannot be used.
    measure: Callable[[Base, S, pa.Table, Bench], list[Measure]]
    # (settings, the forget set's text columns) -> role: column or SQL expression over the rows.
    columns: Callable[[S, Mapping[str, str]], dict[str, str]]
    # The source of rows that the model has not seen, beside those that it may have: read with the same columns.
    others: Callable[[S], list[Source] | None] = lambda settings: None
    # Whether its rows must be ones that the model has not seen, so that a row to forget among them is refused.
    unseen: Callable[[S], bool] = lambda settings: False
    # A model that the judged one is compared with, which must not be the base: folder or Hub id.
    beside: Callable[[S], str | None] = lambda settings: None
    # What it measures with beyond the settings, such as a scorer, its revision and its threshold: kept in the results, and runs
    # are compared only where it is the same.
    instrument: Callable[[S], dict[str, Any]] | None = None
    # Name of the evaluation that it measures again, with that one's items and subjects.
    of: Callable[[S], str | None] = lambda settings: None
    # Raises RecipeError for a recipe that it cannot judge.
    check: Callable[[S, Recipe], None] = lambda settings, recipe: None
    # Raises RecipeError, with the row's number, for items that it cannot measure: asked before anything is trained.
    check_items: Callable[[S, pa.Table, Limits], None] = lambda settings, items, limits: None
    # Tokens that the model writes for each item, at the most, for estimates.
    written_tokens: Callable[[S], int] = lambda settings: 0
    # (settings, items) -> every metric that `measure` gives, and what a higher value says; None where only measuring tells.
    metrics: Callable[[S, pa.Table], Mapping[str, Higher]] | None = None
    # What of it reads or changes the weights themselves, and so needs them whole on one device; "" where nothing does.
    whole: Callable[[S], str] = lambda settings: ""
    reads_rows: bool = True  # False: it brings items of its own, and every measure names its subject
    rereads: bool = False  # True: as it measures it reads files of its own, which its instrument tells the content of
    uses_samples: bool = False  # True: its scores depend on the forget and retain rows too
    compares_texts: bool = False  # True: what other models write is compared with what the base wrote
    version: int = 1  # rises when the same settings give other measurements

    @property
    def summary(self) -> str:
        return summary_of(self.measure)
