"""Unlearning while a model decodes: the recipe's model is a small one, and what it unlearned shifts a large one's logits."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from spunge.recipe.block import Strict
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name
from spunge.registry import RULES

if TYPE_CHECKING:
    from spunge.recipe.schema import Recipe

BY_TEXT = ("reword", "prefix")  # attacks that call the model as it is, and nothing inside it
WRITING = (
    "toxicity",
    "harm",
    "refusal",
    "leakage",
    "fluency",
    "similarity",
    "match",
)  # evaluators of what a model writes


class DecodeSettings(Strict):
    """The large model, and how the small one's changes shift its logits."""

    kind: str = Field(description="offset (default), dexperts or gedi.")
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


class Offset(DecodeSettings):
    """large + alpha * (unlearned small - small), logit by logit."""

    kind: Literal["offset"] = "offset"


class DExperts(DecodeSettings):
    """top_p(large) + alpha * (expert - anti-expert), logits of small models that learned the rows to keep and those to forget."""

    kind: Literal["dexperts"] = "dexperts"
    alpha: float = Field(2.0, gt=0, description="What the offset is multiplied by; published for toxicity: 2.")
    top_p: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Tokens outside this nucleus of the large model are never written, as in the authors' code. 1 keeps all, and "
        "is needed where texts are scored.",
    )
    expert: Literal["retain", "small"] = Field(
        "retain", description="retain: the small model fine-tuned on the retain rows. small: the small model as it is."
    )


class GeDi(DecodeSettings):
    """large + alpha * log P(desired | text, next token), by Bayes' rule of a small model that reads the text after two codes."""

    kind: Literal["gedi"] = "gedi"
    alpha: float = Field(
        30.0,
        gt=0,
        description="omega: the power that the probability of the desired class is raised to; published: 30.",
    )
    rho: float = Field(
        0.2,
        gt=0,
        le=1,
        description="The tokens that are likeliest desired, until they hold this mass, are kept; of the others those with a "
        "probability of `tau`. Published: 0.2. 1 keeps all, and is needed where texts are scored.",
    )
    tau: float = Field(
        0.8, gt=0, le=1, description="Tokens that are desired with at least this probability are kept; published: 0.8."
    )


Decode = Offset | DExperts | GeDi
# Kind -> its settings and its source.
DECODERS: dict[str, tuple[type[DecodeSettings], str]] = {
    "offset": (Offset, "Huang et al. 2024, arXiv 2404.11045"),
    "dexperts": (DExperts, "Liu et al. 2021, arXiv 2105.03023"),
    "gedi": (GeDi, "Krause et al. 2021, arXiv 2009.06367"),
}


def decoding(value: Any) -> Any:
    """What does not say its kind is an offset."""
    return {"kind": "offset", **value} if isinstance(value, Mapping) else value


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
    if isinstance(decode, DExperts):
        _refuse_experts(decode, recipe)
    if isinstance(decode, GeDi):
        _refuse_classes(recipe)
    if (hiding := _hiding(decode)) is not None:
        for entry in recipe.evaluate:
            if entry.kind not in WRITING and dict(entry).get("of") is None:
                raise ValueError(
                    f"decode.{hiding}: {evaluation_name(entry)!r} scores texts, and the tokens that are left out have no "
                    "probability; set it to 1"
                )
    for entry in recipe.evaluate:
        _refuse_evaluation(entry)


def refuse_classes_alone(recipe: "Recipe") -> None:
    """Raises ValueError for a method whose model is of use beside `decode` only."""
    unlearn = recipe.unlearn
    if unlearn is not None and unlearn.method == "gedi" and not isinstance(recipe.decode, GeDi):
        raise ValueError(
            "unlearn.method: 'gedi': its model tells texts to forget from others and forgets nothing by itself; give decode with "
            "kind gedi, or take another method"
        )


def _hiding(decode: Decode) -> str | None:
    """The setting that leaves tokens without a probability, and its value; None where every token has one."""
    if isinstance(decode, DExperts) and decode.top_p < 1:
        return f"top_p: {decode.top_p:g}"
    if isinstance(decode, GeDi) and decode.rho < 1:
        return f"rho: {decode.rho:g}"
    return None


def _refuse_classes(recipe: "Recipe") -> None:
    method = None if recipe.unlearn is None else recipe.unlearn.method
    if method != "gedi":
        raise ValueError(
            f"unlearn.method: {method!r}: what decodes by gedi is a class-conditional model, which the method gedi trains; set it "
            "to gedi"
        )
    if any(control.train == "sequential" for control in recipe.controls):
        raise ValueError("controls: class-conditional models are not trained in a row; leave sequential out")


def _refuse_experts(decode: DExperts, recipe: "Recipe") -> None:
    unlearn = dict(recipe.unlearn or {})
    if unlearn.get("method") != "tvn" or unlearn.get("strength") != 1:
        raise ValueError(
            f"unlearn.method: {unlearn.get('method')!r}: the experts of dexperts are what tvn learns and then subtracts; set it "
            "to tvn, with a strength of 1"
        )
    if decode.expert == "retain" and recipe.retain is None:
        raise ValueError(
            "retain: missing; the expert of dexperts is fine-tuned on it; give it, or set decode.expert to small"
        )
    if any(control.train == "sequential" for control in recipe.controls):
        raise ValueError("controls: anti-experts are not trained in a row; leave sequential out")


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


def shift_of(decode: Decode, unlearn: Any, parts: Sequence[Any]) -> dict[str, Any]:
    """How the offsets of a model are merged and added, as `spunge.model.offsets.Shift` takes it, without what has no effect.
    unlearn: the method's settings; parts: the model's small ones."""
    merge = "sum" if decode.merge == "weights" or len(parts) == 1 else decode.merge
    shift: dict[str, Any] = {"alpha": decode.alpha, "merge": merge}
    if merge == "ties":
        shift["density"] = 0.2 if decode.density is None else decode.density
    if isinstance(decode, DExperts) and decode.top_p < 1:
        shift["top_p"] = decode.top_p
    if isinstance(decode, GeDi):
        shift["scale"] = dict(unlearn)["scale"]
        shift |= {"rho": decode.rho, "tau": decode.tau} if decode.rho < 1 else {}
    return shift
