"""What must fit before a merge writes anything: shapes, dtypes, architecture, vocabulary, the base of each delta."""

import math
from collections.abc import Sequence
from typing import Any

from spunge.errors import RecipeError
from spunge.merging.rule import Rule
from spunge.model.loadable import check_fit
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.folder import note_of
from spunge.weights.opening import check_source
from spunge.weights.quantised import refuse_8_bits, refuse_quantised
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
    notes = check_weights(rule, settings, weights)
    for name, value in settings:
        if isinstance(value, list) and len(value) != len(sources):
            raise RecipeError(
                f"merge.{name}: {len(value)} values for {len(sources)} models; give one, or one per model"
            )
    refuse_quantised(base)
    refuse_8_bits(base)
    unread = check_fit(base).notes
    for source in sources:
        check_source(base, source)
    own = [note] if (note := note_of(base.folder)) else []
    return [*own, *unread, *(note for source in sources for note in source.notes), *notes]


def check_weights(rule: Rule, settings: Any, weights: Sequence[float]) -> list[str]:
    """Raises RecipeError for weights that the rule does not read or cannot use; returns notes on odd ones."""
    name, kind, size = settings.rule, rule.weighting(settings), sum(map(abs, weights))
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"--weight: {shown}: weights must be finite numbers")
    if kind == "none" and any(weight != 1 for weight in weights):
        raise RecipeError(f"--weight: {shown}: rule {name!r} reads no weights; leave them out")
    if size == 0:
        raise RecipeError(f"--weight: {shown}: nothing would be merged; give a weight that is not 0")
    if kind == "sum" and abs(sum(weights)) <= 1e-6 * size:
        raise RecipeError(f"--weight: {shown}: rule {name!r} divides by their sum, which is 0; give others")
    if kind == "shares" and min(weights) < 0:
        raise RecipeError(f"--weight: {shown}: rule {name!r} takes them as shares; give none below 0")
    if kind == "agreeing" and min(weights) < 0:
        return [
            f"weights below 0 count in the election of signs alone: {name} divides by the weights of the models that agree, "
            "as mergekit does, so a change that stands alone comes back as it is; task_arithmetic subtracts"
        ]
    return []
