"""An evaluation with other prompts in place of its own, several for each item."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.attacks.target import Target, prompt_role
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings
from spunge.recipe.schema import Recipe
from spunge.registry import EVALUATORS


def measured_over(
    base: Base, target: Target, bench: Bench, variants: Sequence[Sequence[str]]
) -> tuple[list[Measure], np.ndarray]:
    """The evaluation with each of an item's prompts in turn, measured at one go; and whose prompt each is."""
    role = target.prompt_role
    owners = np.repeat(np.arange(len(variants)), [len(prompts) for prompts in variants])
    prompts = pa.array([prompt for prompts in variants for prompt in prompts])
    table = taken(target.items, owners)
    table = table.set_column(table.column_names.index(role), role, prompts)
    measures = target.measured(base, bench, items=table)
    if any(measure.subject is not None or len(measure.numerator) != len(owners) for measure in measures):
        raise RecipeError(f"evaluate.of: a {target.settings.kind!r} evaluation does not measure item by item")
    return measures, owners


def item_means(measures: Sequence[Measure], owners: np.ndarray) -> list[Measure]:
    """Each item's mean over its prompts."""
    counts = np.bincount(owners)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(owners, weights=values) / counts

    return [
        replace(measure, numerator=mean(measure.numerator), denominator=mean(measure.denominator))
        for measure in measures
    ]


def check_prompts(_attack: AttackSettings, other: EvaluatorSettings | None, recipe: Recipe) -> None:
    """Raises RecipeError for an evaluation that puts no prompts to the model."""
    if other is not None:
        prompt_role(other, list(EVALUATORS.get(other.kind).columns(other, recipe.columns)))
