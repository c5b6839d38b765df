"""Unlearning while a model decodes: the recipe's model is a small one, and what it unlearned shifts a large one's logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spunge.recipe.block import Strict
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name
from spunge.registry import RULES

if TYPE_CHECKING:
    from spunge.recipe.schema import Recipe

BY_TEXT = ("reword", "prefix")  # attacks that call the model as it is, and nothing inside it


class Decode(Strict):
    """The large model, and how the small one's changes shift its logits."""

    kind: Literal["offset"] = Field(
        "offset",
        description="offset: large + alpha * (unlearned small - small), logit by logit (Huang et al. 2024, arXiv 2404.11045).",
    )
    path: str = Field(
        description="Hub id, or a folder: the large model, which is never trained. It must share the small one's vocabulary."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    alpha: float = Field(1.0, gt=0, description="What the offset is multiplied by.")
    merge: Literal["weights", "sum", "mean", "ties"] = Field(
        "weights",
        description="How several parts become one offset. weights: that of the small model that `merge` makes of them. sum, mean, "
        "ties: each part has an offset of its own, and these logits are merged at every position.",
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Of ties: share of the vocabulary that each offset keeps at a position, by magnitude. Default: 0.2.",
    )


def refuse_decode(decode: Decode, recipe: "Recipe") -> None:
    """Raises ValueError for what cannot be done to a model whose weights do not change."""
    if decode.density is not None and decode.merge != "ties":
        raise ValueError(
            f"decode.density: merge {decode.merge!r} keeps every entry; leave density out, or merge by ties"
        )
    if recipe.unlearn is None:
        raise ValueError("decode: nothing is unlearned, and nothing shifts the model; leave it out")
    if decode.merge != "weights" and recipe.merge != RULES.get("ties").settings.model_validate({"rule": "ties"}):
        raise ValueError(
            f"merge: decode.merge {decode.merge!r} merges logits, and no weights are merged; leave one of the two out"
        )
    for setting, block, instead in (
        ("teach", recipe.teach, "the small model alone would be taught; teach both by runs of their own"),
        ("calibrate", recipe.calibrate, "scales are of weights, and none changes; set decode.alpha"),
        ("watch", recipe.watch, "the small model alone would be measured"),
    ):
        if block is not None:
            raise ValueError(f"{setting}: beside decode {instead}; leave one of the two out")
    for entry in recipe.evaluate:
        _refuse_evaluation(entry)


def _refuse_evaluation(entry: EvaluatorSettings) -> None:
    name, settings = evaluation_name(entry), dict(entry)
    attack, generation = settings.get("attack"), settings.get("generation")
    if attack is not None and attack.kind not in BY_TEXT:
        raise ValueError(
            f"evaluate.attack: {name!r}: {attack.kind} needs a model's weights or states, and what decode judges are logits of "
            f"several models; take {' or '.join(BY_TEXT)}, or leave it out"
        )
    if "gradient" in settings.get("scores", ()):
        raise ValueError(
            f"evaluate.scores: {name!r}: gradient is of one model's weights, and what decode judges are logits of several; leave "
            "it out"
        )
    if generation is not None and dict(generation).get("engine") == "vllm":
        raise ValueError(f"evaluate.generation.engine: {name!r}: vllm cannot shift logits; leave engine out")


def shift_of(decode: Decode, parts: Sequence[Any]) -> dict[str, Any]:
    """How the offsets of a model are merged and added, as `spunge.model.offsets.Shift` takes it. parts: its small models."""
    merge = "sum" if decode.merge == "weights" or len(parts) == 1 else decode.merge
    density = 0.2 if decode.density is None else decode.density
    return {"alpha": decode.alpha, "merge": merge, "density": density}
