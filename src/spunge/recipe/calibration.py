"""The scale at which models are compared: `calibrate`."""

from collections.abc import Mapping, Sequence

from pydantic import Field

from spunge.recipe.block import Strict
from spunge.recipe.evaluating import EvaluatorSettings, measured_by
from spunge.recipe.merging import Control, RuleSettings
from spunge.recipe.training import MethodSettings


class Calibrate(Strict):
    """Set the scale of everything that unlearned so that a metric keeps a share of the base's."""

    evaluation: str = Field(
        description="Name of an evaluation. Half of its items, of each subject, are for this; the other half alone is judged."
    )
    metric: str = Field(description="A metric that it measures, such as perplexity.")
    subject: str | None = Field(
        None, description="What must be kept: one of its subjects. Default: its only one, or that of all rows."
    )
    keep: float = Field(
        0.95, gt=0, le=1, description="Share of the base's: value / base, or base / value where less is better."
    )
    max_scale: float = Field(4.0, gt=0, description="The largest scale.")
    tries: int = Field(8, ge=2, description="Scales that are tried for each model, at most.")
    tolerance: float = Field(
        0.005, ge=0, description="A scale that keeps so little more than the share is near enough."
    )
    seed: int = Field(0, ge=0, description="Of the halves.")


def refuse_calibration(
    calibrate: Calibrate,
    evaluations: Mapping[str, EvaluatorSettings],
    unlearn: MethodSettings | None,
    merge: RuleSettings,
    controls: Sequence[Control],
) -> None:
    """Raises ValueError for a calibration by what cannot be measured at several scales, or of what has no scale."""
    measured_by(calibrate.evaluation, evaluations, "calibrate")
    if unlearn is None:
        raise ValueError("calibrate: nothing is unlearned, and nothing has a scale; leave it out")
    merges = {"merge": merge} | {
        f"controls.{place}.merge": control.merge for place, control in enumerate(controls) if control.merge
    }
    for setting, rule in merges.items():
        if (scale := type(rule).model_fields.get("scale")) is None:
            raise ValueError(f"{setting}.rule: {rule.rule!r} has no scale, which calibrate sets; take another rule")
        if (given := vars(rule)["scale"]) != scale.default:
            raise ValueError(f"{setting}.scale: {given!r}: calibrate sets it; leave one of the two out")
