"""How a model is trained, whatever for: the steps, the optimizer, the lengths, and which of its weights."""

import math
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spunge.errors import RecipeError
from spunge.recipe.block import Strict


class LoRA(Strict):
    """Low-rank factors beside the frozen weights (Hu et al. 2021), through peft."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="r: rank of the factors.")
    alpha: float = Field(16, gt=0, description="The factors' product is scaled by alpha / rank.")
    dropout: float = Field(0.01, ge=0, lt=1, description="Share of the adapters' inputs that is dropped at each step.")
    start: Literal["own", "shared"] = Field(
        "own",
        description="The random factors that a branch begins with. own: drawn for each branch, whose changes then have no "
        "direction in common. shared: the same in every branch and control of a seed, so that their changes lie in one space.",
    )
    targets: list[str] | Literal["default", "all-linear"] = Field(
        "default",
        description="Names of the adapted layers, such as [q_proj, v_proj]. default: peft's for the architecture.",
    )


class Selected(Strict):
    """Some tensors in full, chosen by name."""

    kind: Literal["tensors"] = "tensors"
    match: list[str] = Field(min_length=1, description="Patterns of parameter names, such as '*.mlp.down_proj.weight'.")


class Everything(Strict):
    """Every tensor in full (full fine-tuning)."""

    kind: Literal["all"] = "all"


Trainable = Annotated[LoRA | Selected | Everything, Field(discriminator="kind")]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "sgd", "rmsprop", "sophia"]


class SAM(Strict):
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412; for unlearning Fan et al. 2025, arXiv 2502.05374)."""

    sam: float = Field(gt=0, description="rho: how far the weights are moved up the loss before its gradient is taken.")
    optimizer: Optimizer = Field("adamw", description="What makes the steps.")


OF_BITSANDBYTES: frozenset[Optimizer] = frozenset({"adamw_8bit", "paged_adamw_8bit", "lion"})
OPTIMIZERS_TOLD = (
    "adamw_8bit: its moments in 8 bits. paged_adamw_8bit: these in the machine's memory while a GPU's is full. lion: one moment. "
    "sgd: with Nesterov's momentum of 0.9. sophia: of second order (SOUL). The 8-bit ones and lion need `spunge[quant]`."
)
SAM_TOLD = "{sam: rho}: the gradient of what is forgotten is taken where the loss is highest within rho (SAM)."


def refuse_without_bitsandbytes(setting: str, value: str) -> None:
    """Raises RecipeError for what bitsandbytes alone can do, where that is not installed."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"{setting}: {value!r} needs bitsandbytes; pip install 'spunge[quant]', or leave it out")


def stepper(optimizer: Optimizer | SAM) -> Optimizer:
    """The name of what makes the steps."""
    return optimizer.optimizer if isinstance(optimizer, SAM) else optimizer


def refuse_optimizer(given: Optimizer | SAM, setting: str) -> None:
    """Raises RecipeError for an optimizer whose package is not installed. setting: the block that names it."""
    optimizer = stepper(given)
    if optimizer in OF_BITSANDBYTES:
        refuse_without_bitsandbytes(f"{setting}.optimizer", optimizer)


class DescentSettings(Strict):
    """What every training by gradients can be told."""

    epochs: float | None = Field(None, gt=0, description="Passes over each part's samples. Give this or steps.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps for each part.")
    batch_size: int = Field(8, ge=1, description="Forget samples a step.")
    accumulation: int = Field(
        1, ge=1, description="Batches that make up an optimizer step: its gradient is that of all of them as one batch."
    )
    optimizer: Optimizer | SAM = Field("adamw", description=f"{OPTIMIZERS_TOLD} {SAM_TOLD}")
    learning_rate: float = Field(1e-4, gt=0, description="Of the optimizer.")
    weight_decay: float = Field(
        0.0, ge=0, description="Taken off the weights beside the step; with sgd and rmsprop, added to the gradient."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Of the learning rate, down to 0."
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0.")
    max_grad_norm: float | None = Field(None, gt=0, description="Gradients are scaled down to this norm.")
    max_length: int = Field(256, ge=2, description="Tokens of a sample; longer ones are cut.")
    packing: bool = Field(
        False,
        description="Fill sequences of max_length with plain texts, one after the other, in place of padding. Needs steps.",
    )

    @model_validator(mode="before")
    @classmethod
    def _given_length_wins(cls, values: Any) -> Any:
        """Steps given without epochs replace a default of epochs, and the other way round."""
        if isinstance(values, dict):
            for given, other in (("steps", "epochs"), ("epochs", "steps")):
                if values.get(given) is not None and other not in values:
                    return {**values, other: None}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "DescentSettings":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both (set the other to null)")
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs or steps")
        if self.packing and self.steps is None:
            raise ValueError(
                "packing: how many sequences an epoch has is known too late; give steps in place of epochs"
            )
        return self

    def steps_for(self, rows: int) -> int:
        """Optimizer steps for so many samples."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / self.batch_size)
        return max(1, math.ceil(batches * (self.epochs or 0) / self.accumulation))


class MethodSettings(Strict):
    method: str = Field(description="Name of the unlearning method (`spunge list methods`).")
