"""The scale at which models are compared: `calibrate`."""

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from spunge.errors import suggestion
from spunge.recipe.aggregates import AnyAggregate, HarmonicMean, terms_of
from spunge.recipe.block import Strict
from spunge.recipe.evaluating import EvaluatorSettings, measured_by
from spunge.recipe.merging import Control, RuleSettings
from spunge.recipe.training import MethodSettings


class Calibrate(Strict):
    """Set the scale of everything that unlearned so that a metric keeps a share of the base's."""

    evaluation: str | None = Field(
        None,
        description="Name of an evaluation. Half of its items, of each subject, are for this; the other half alone is judged.",
    )
    metric: str | None = Field(None, description="A metric that it measures, such as perplexity.")
    aggregate: str | None = Field(
        None,
        description="In place of both, one of the recipe's harmonic means, such as TOFU's model utility: of each of its "
        "evaluations half of the items are for this.",
    )
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

    @model_validator(mode="after")
    def _one_figure(self) -> "Calibrate":
        if self.aggregate is None:
            for name in ("evaluation", "metric"):
                if dict(self)[name] is None:
                    raise ValueError(f"{name}: missing; give evaluation and metric, or aggregate")
            return self
        for name in ("evaluation", "metric", "subject"):
            if dict(self)[name] is not None:
                raise ValueError(
                    f"{name}: the aggregate {self.aggregate!r} says of what it is; leave one of the two out"
                )
        return self


def calibrated_by(calibrate: Calibrate | None, aggregates: Mapping[str, AnyAggregate]) -> list[str]:
    """The evaluations whose items a calibration measures."""
    if calibrate is None:
        return []
    if calibrate.aggregate is None:
        return [str(calibrate.evaluation)]
    return list(dict.fromkeys(term.evaluation for term in terms_of(aggregates[calibrate.aggregate])))


def refuse_calibration(
    calibrate: Calibrate,
    evaluations: Mapping[str, EvaluatorSettings],
    aggregates: Mapping[str, AnyAggregate],
    unlearn: MethodSettings | None,
    merge: RuleSettings,
    controls: Sequence[Control],
) -> None:
    """Raises ValueError for a calibration by what cannot be measured at several scales, or of what has no scale."""
    if (name := calibrate.aggregate) is not None:
        if name not in aggregates:
            raise ValueError(f"calibrate.aggregate: no aggregate is called {name!r}{suggestion(name, aggregates)}")
        if not isinstance(aggregates[name], HarmonicMean):
            raise ValueError(
                f"calibrate.aggregate: {name!r} ({aggregates[name].kind}) is no share of what must be kept; name a harmonic_mean"
            )
    for evaluation in calibrated_by(calibrate, aggregates):
        measured_by(evaluation, evaluations, "calibrate")
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
