"""RMU's settings, and the numbers that were published for some models."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spunge.errors import RecipeError
from spunge.recipe.block import Strict
from spunge.recipe.training import Trainable
from spunge.unlearning.loop import TrainingSettings

TRAINED_BLOCKS = 3


TYPICAL_LAYER = 0.23  # share of the depth: block 7 of Zephyr's 32


# Of the method's authors, for the joint run; epochs and min_cosine are SPUNGE's, for a part.
_ZEPHYR: dict[str, Any] = {
    "layer": 7,
    "coefficient": 6.5,
    "alpha": 1200.0,
    "learning_rate": 5e-5,
    "batch_size": 4,
    "skip_first": 0,
    "joint_steps": 150,
    "epochs": 2.0,
    "steps": None,
    "min_cosine": 0.5,
    "max_length": 512,
    "max_lengths": {"bio": 512, "cyber": 768, "retain": 512},
}


PRESETS: dict[str, dict[str, Any]] = {
    "zephyr-7b": _ZEPHYR,
    # As published with `--param_ids 7`, which picks a single matrix of one expert by its position in the block;
    # here the output projections of all experts are trained.
    "mixtral-8x7b": {**_ZEPHYR, "coefficient": 300.0, "alpha": 1600.0},
    # What the published script does when it is told nothing.
    "reference": {
        **{key: value for key, value in _ZEPHYR.items() if key != "min_cosine"},
        "coefficient": 20.0,
        "alpha": 100.0,
        "joint_steps": 80,
        "epochs": None,
        "steps": 80,
    },
}


class Relative(Strict):
    relative: float = Field(
        5.0, gt=0, description="c is so many times the norm of the base's hidden state, token by token."
    )


class RMUSettings(TrainingSettings):
    method: str = "rmu"
    preset: Literal["zephyr-7b", "mixtral-8x7b", "reference"] | None = Field(
        None,
        description="Published numbers for every setting that the recipe does not give; reference: the script's own defaults.",
    )
    layer: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        TYPICAL_LAYER,
        description="l: the block whose output is steered, as an index from 0 or, below 1, a share of the depth. auto: chosen by "
        "short trials, once for all of a run.",
    )
    coefficient: float | Relative | Literal["auto"] = Field(
        default=Relative(),
        description="c: the length of the target. A number as published (Zephyr-7b: 6.5), or {relative: 5}, which fits any model. "
        "auto: a relative one, chosen by short trials.",
    )
    alpha: float = Field(
        100.0,
        ge=0,
        description="Weight of the retain term, both terms being means over tokens and hidden size (Zephyr-7b: 1200).",
    )
    skip_first: int | None = Field(
        None,
        ge=0,
        description="First tokens of each text to leave out of both terms: many models park a huge norm there. "
        "Default: 1 for a relative coefficient, 0 for a published one.",
    )
    min_cosine: float | None = Field(
        None,
        gt=-1,
        lt=1,
        description="A branch, not the joint control, stops early once the cosine of M_u and M_0 on forget tokens is below this.",
    )
    keep_activations: float = Field(
        0.5,
        ge=0,
        description="GiB on the model's device. Where a part's or the retain texts' activations fit in so much and each text comes "
        "about once or more, those that never change are kept for the next time, in other branches too. 0: none are.",
    )
    trainable: Trainable | None = Field(
        None, description="Default: the MLP output projections of blocks l-2, l-1 and l."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over each part's samples. Give this or steps.")
    steps: int | None = Field(80, ge=1, description="Optimizer steps for each part; the joint control takes their sum.")
    learning_rate: float = Field(1e-3, gt=0, description="Of the optimizer (Zephyr-7b as published: 5e-5).")

    @model_validator(mode="before")
    @classmethod
    def _published_numbers(cls, values: Any) -> Any:
        """A preset stands in for what is not given; a length that is given replaces the preset's of either kind."""
        if not isinstance(values, dict) or str(values.get("preset")) not in PRESETS:
            return values
        given = set(values)
        if values.get("epochs") is not None or values.get("steps") is not None:
            given |= {"epochs", "steps"}
        if "max_length" in given:
            given.add("max_lengths")
        published = PRESETS[str(values["preset"])]
        return {**{key: value for key, value in published.items() if key not in given}, **values}


def block_index(layer: int | float | str, depth: int) -> int:
    """l as an index; a value below 1 that is no whole number is a share of the depth. Raises RecipeError outside it."""
    if isinstance(layer, str):
        raise RecipeError(
            f"unlearn.layer: {layer!r} is chosen once for a whole run, so `spunge.run` must do it; give a number"
        )
    index = round(layer * depth) if isinstance(layer, float) and 0 < layer < 1 else int(layer)
    if not 0 <= index < depth:
        raise RecipeError(f"unlearn.layer: {layer}: the model has {depth} blocks; give 0 to {depth - 1}")
    return index
