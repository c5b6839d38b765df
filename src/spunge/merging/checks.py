"""What must fit before a merge writes anything: shapes, dtypes, architecture, vocabulary, the base of each delta."""

import math
from collections.abc import Sequence
from typing import Any

from spunge.errors import RecipeError
from spunge.merging.rule import Rule
from spunge.model.loadable import check_fit
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.opening import check_source
from spunge.weights.sources import Source


def check(
    base: Checkpoint, sources: Sequence[Source], rule: Rule, settings: Any, weights: Sequence[float]
) -> list[str]:
    """Raises RecipeError for inputs that do not fit; returns notes on what is only odd."""
    if not sources:
        raise RecipeError("--model: nothing to merge; give at least one delta, checkpoint or adapter")
    least, most = rule.branches
    if len(sources) < least or (most is not None and len(sources) > most):
        wanted = f"{least}" if least == most else f"{least} to {most}" if most else f"at least {least}"
        raise RecipeError(f"--model: rule {settings.rule!r} merges {wanted} models, {len(sources)} given")
    if len(weights) != len(sources):
        raise RecipeError(f"--weight: {len(weights)} weights for {len(sources)} models; give one per model, or none")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"--weight: {weights} must be finite numbers")
    for name, value in settings:
        if isinstance(value, list) and len(value) != len(sources):
            raise RecipeError(
                f"merge.{name}: {len(value)} values for {len(sources)} models; give one, or one per model"
            )
    check_fit(base)
    for source in sources:
        check_source(base, source)
    return [note for source in sources for note in source.notes]
