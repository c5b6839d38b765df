"""How branches become one model, and the baselines beside it: `merge` and `controls`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, model_validator

from spunge.errors import RecipeError, suggestion
from spunge.files import is_device
from spunge.recipe.block import Strict
from spunge.recipe.model import Dtype
from spunge.recipe.named import named
from spunge.recipe.patterns import STAGE_NAME
from spunge.registry import RULES


class RuleSettings(Strict):
    rule: str = Field(description="Name of the merge rule (`spunge list rules`).")
    dtype: Dtype = Field(
        "base",
        description="What the merged checkpoint is written in: the base's own dtype, or another. Branches and controls are judged "
        "as they would be written so. float32 holds the merge whole, in twice the disk of a 16-bit base.",
    )
    rounding: Literal["auto", "nearest", "stochastic"] = Field(
        "auto",
        description="How sums are rounded to a 16-bit dtype. nearest loses what is below half a step of it; stochastic goes up or "
        "down by a fixed draw, so that small changes survive in the mean over many entries; auto: nearest, or stochastic where "
        "nearest would lose more than a tenth of the change.",
    )


TRAININGS = ("joint", "random", "sequential")


class Control(Strict):
    """A baseline: what is trained, and how that becomes one model."""

    name: str = Field(
        pattern=STAGE_NAME,
        max_length=60,
        description="Names its stage, control:NAME, and its folder.",
    )
    train: Literal["parts", "joint", "random", "sequential"] = Field(
        "parts",
        description="parts: the run's own branches, merged otherwise. joint: the same method, samples and steps on all parts "
        "at once. random: the same samples split at random into parts of the same sizes, merged alike: is it the attribute "
        "that helps, or just splitting? sequential: one part after the other, each from the model that the one before left.",
    )
    merge: Annotated[SerializeAsAny[RuleSettings], named(RULES, "rule", "ties")] | None = Field(
        None,
        description="How its deltas become one model. Default: as the recipe's merge; joint and sequential: as they are.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Of a joint control's own, such as one that was tuned for it. Default: unlearn.learning_rate.",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps of a joint control's own. Default: unlearn.joint_steps, else the parts' sum.",
    )

    @property
    def own(self) -> dict[str, float]:
        """What it is trained with instead of the recipe's settings."""
        given = {"learning_rate": self.learning_rate, "steps": self.steps}
        return {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _says_something_else(self) -> "Control":
        if self.train == "parts" and self.merge is None:
            raise ValueError("the run's own branches, merged as the recipe says, are `merged`; give merge")
        if self.own and self.train != "joint":
            raise ValueError(f"{next(iter(self.own))}: a joint control alone has its own; leave it out")
        if is_device(self.name):
            raise ValueError(
                f"the name {self.name!r} is a device's on Windows, and can be no folder there; give another"
            )
        if self.name in TRAININGS and (self.train != self.name or (self.merge and self.train != "random")):
            raise ValueError(f"the name {self.name!r} is kept for {{train: {self.name}}} without a merge of its own")
        return self


def controls_of(value: Any, info: ValidationInfo) -> Any:
    """`joint`, `random`, `sequential` and a merge rule's name are short for a control of that name. A merge of a control's own
    is written as the recipe's is, where it does not say otherwise: what is compared has one precision."""
    if not isinstance(value, list):
        return value
    merge = info.data.get("merge")
    written = {} if merge is None else {"dtype": merge.dtype, "rounding": merge.rounding}
    return [_written_as(_control(item) if isinstance(item, str) else item, written) for item in value]


def _written_as(control: Any, written: Mapping[str, Any]) -> Any:
    own = control.get("merge") if isinstance(control, Mapping) else None
    own = {"rule": own} if isinstance(own, str) else own
    return {**control, "merge": {**written, **own}} if isinstance(own, Mapping) else control


def _control(name: str) -> dict[str, Any]:
    if name in TRAININGS:
        return {"name": name, "train": name}
    if name in RULES.names():
        return {"name": name, "train": "parts", "merge": {"rule": name}}
    raise RecipeError(f"controls: no control {name!r}{suggestion(name, [*TRAININGS, *RULES.names()])}")
