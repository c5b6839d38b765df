"""What must fit before a merge writes anything: shapes, dtypes, architecture, vocabulary, the base of each delta."""

import math
from collections.abc import Sequence
from typing import Any

from spunge.checkpoints import Checkpoint
from spunge.merging.rule import Rule
from spunge.merging.sources import Source
from spunge.registry import RecipeError


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
    for source in sources:
        _check_source(base, source)
    return [note for source in sources for note in getattr(source, "notes", [])]


def _check_source(base: Checkpoint, source: Source) -> None:
    made_from = getattr(source, "base", None)
    if made_from is not None and made_from != base.fingerprint():
        raise RecipeError(
            f"--base: {source.label!r} was made from a base with fingerprint {made_from[:12]}, this one has "
            f"{base.fingerprint()[:12]}; give the base it was made from"
        )
    for name in source.names:
        if name not in base.tensors:
            raise RecipeError(
                f"--model: {source.label!r} changes tensor {name!r}, which the base lacks; is it another model?"
            )
        if source.shape(name) != base.tensors[name].shape:
            raise RecipeError(
                f"--model: tensor {name!r} of {source.label!r} has shape {list(source.shape(name))}, the base's has "
                f"{list(base.tensors[name].shape)}; is it another model?"
            )
