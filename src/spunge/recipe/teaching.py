"""Fine-tuning before all else: `teach`."""

from typing import Literal

from pydantic import Field

from spunge.recipe.model import Dtype
from spunge.recipe.rows import Rows
from spunge.recipe.training import DescentSettings, Everything, Trainable


class TeachSettings(DescentSettings, Rows):
    """Fine-tuning before all else. Defaults as TOFU's (Maini et al. 2024, arXiv 2401.06121, section 3.1)."""

    trainable: Trainable = Field(default=Everything(), description="What is trained. Default: every tensor.")
    epochs: float | None = Field(5.0, gt=0, description="Passes over the rows. Give this or steps.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Rows a step.")
    learning_rate: float = Field(1e-5, gt=0, description="Of the optimizer.")
    weight_decay: float = Field(
        0.01, ge=0, description="Taken off the weights beside the step; with sgd and rmsprop, added to the gradient."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Of the learning rate, down to 0.")
    warmup: float = Field(
        0.2, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0: 1 of 5 epochs."
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    max_length: int = Field(512, ge=2, description="Tokens of a row; longer ones are cut.")
    dtype: Dtype = Field(
        "base",
        description="What the taught model is written in: the given model's own dtype, or another. Rounded as `merge.rounding: "
        "auto` has it.",
    )
    seed: int = Field(0, ge=0, description="Of the teaching alone: another seed of the recipe teaches nothing anew.")
