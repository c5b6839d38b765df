"""Audits: attacks on a model that has forgotten, each followed by the same measurement. What comes back was not gone.

    - {kind: choices, name: capitals, source: capitals.jsonl}
    - {kind: audit, of: capitals, attack: relearn}
    - {kind: audit, of: capitals, attack: {kind: quantise, bits: int8}}

The attacks: relearn (a little fine-tuning), quantise (rounded weights), reword and prefix (other prompts), probe (a linear
probe of hidden states), membership (forget rows against unseen ones). Results say how much came back: (attacked - after) /
(before - after). The base is attacked as well, for comparison. The model is left as it was, bit for bit.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from spunge.data.samples import Samples, table_sha256
from spunge.errors import RecipeError
from spunge.evaluation.attacks.hidden import Probe, probed
from spunge.evaluation.attacks.membership import Membership, told_apart
from spunge.evaluation.attacks.quantisation import Quantise, quantised
from spunge.evaluation.attacks.relearning import Relearn, relearned
from spunge.evaluation.attacks.rewording import Prefix, Reword, by_question, prefixed, read_rewordings, reworded
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench, Evaluator, Measure
from spunge.model.loading import Base
from spunge.recipe.schema import EvaluatorSettings, Sources

Attack = Annotated[Relearn | Quantise | Reword | Prefix | Probe | Membership, Field(discriminator="kind")]


def _block(value: Any) -> Any:
    """An attack's name stands for its defaults."""
    return {"kind": value} if isinstance(value, str) else value


class AuditSettings(EvaluatorSettings):
    kind: Literal["audit"] = "audit"
    attack: Annotated[Attack, BeforeValidator(_block)] = Field(
        description="relearn, quantise, reword, prefix, probe or membership; or {kind: one of these, ...} with its settings."
    )
    of: str | None = Field(
        None, description="Name of the evaluation that is measured again. Every attack but membership needs it."
    )
    label: str | None = Field(
        None, description="What metrics call the attack, where two attacks' would be called the same."
    )
    source: Sources | None = Field(
        None, description="membership: rows that the model has not seen. reword: rows with original and reworded."
    )

    @model_validator(mode="before")
    @classmethod
    def _names_itself(cls, values: Any) -> Any:
        """By default an audit is called by what it does: `relearn capitals`."""
        if not isinstance(values, Mapping) or values.get("name") is not None:
            return values
        block = _block(values.get("attack"))
        words = [block.get("kind") if isinstance(block, Mapping) else None, values.get("of")]
        return {**values, "name": " ".join(str(word) for word in words if word) or None}

    @model_validator(mode="after")
    def _makes_sense(self) -> "AuditSettings":
        kind = self.attack.kind
        if (self.of is None) != (kind == "membership"):
            raise RecipeError(
                f"evaluate.of: missing; name the evaluation that attack {kind} measures again"
                if self.of is None
                else "evaluate.of: attack membership measures nothing again; it reads unseen rows of its own (source)"
            )
        if self.of is None and self.source is None and self.where is None:
            raise RecipeError("evaluate.source: missing; attack membership needs rows that the model has not seen")
        own = {"membership": {"source", "where", "limit", "subject"}, "reword": {"source", "where"}}.get(kind, set())
        for setting in ("source", "where", "limit", "by", "subject"):
            if getattr(self, setting) is not None and setting not in own:
                raise RecipeError(
                    f"evaluate.{setting}: attack {kind} has no use for it; items and subjects are those of {self.of!r}"
                    if self.of
                    else f"evaluate.{setting}: attack {kind} has no use for it; its subjects are the parts"
                )
        return self


def columns(settings: AuditSettings, forget: Mapping[str, str]) -> dict[str, str]:
    return settings.attack.columns(forget) if isinstance(settings.attack, Membership) else {}


def instrument(settings: AuditSettings) -> dict[str, Any]:
    """The rewordings' content, which is read from a file of the audit's own."""
    if isinstance(settings.attack, Reword) and settings.source is not None:
        return {"rewordings": table_sha256(read_rewordings(settings, settings.attack))}
    return {}


def measure(base: Base, settings: AuditSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """How much of what was forgotten comes back after an attack: relearning, quantisation, other prompts, probes."""
    attack = settings.attack
    if isinstance(attack, Membership):
        return told_apart(base, attack, Samples(items), settings.label, bench)
    target = Target(_audited(settings, bench), items, settings.label)
    match attack:
        case Relearn():
            return relearned(base, attack, target, bench)
        case Quantise():
            return quantised(base, attack, target, bench)
        case Reword():
            given = by_question(read_rewordings(settings, attack)) if settings.source is not None else None
            return reworded(base, attack, target, bench, given)
        case Prefix():
            return prefixed(base, attack, target, bench)
        case Probe():
            return probed(base, attack, target, bench)


def _audited(settings: AuditSettings, bench: Bench) -> EvaluatorSettings:
    found = bench.settings_of[str(settings.of)]
    if found.kind == settings.kind:
        raise RecipeError(
            f"evaluate.of: {settings.of!r} is an audit itself; name the evaluation that it measures again"
        )
    return found


AUDIT = Evaluator(
    settings=AuditSettings,
    source="Lynch et al. 2024, arXiv 2402.16835",
    measure=measure,
    columns=columns,
    instrument=instrument,
    of=lambda settings: settings.of,
    uses_samples=True,
)
