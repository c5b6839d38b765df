"""Audits: attacks on a model that has forgotten, each followed by the same measurement. What comes back was not gone.

    - {kind: choices, name: capitals, source: capitals.jsonl}
    - {kind: audit, of: capitals, attack: relearn}
    - {kind: audit, of: capitals, attack: {kind: quantise, bits: int8}}

The attacks are the registry's (`spunge list attacks`), or `attack: path/to/file.py:NAME`. Results say how much came back:
(attacked - after) / (before - after). The base is attacked as well, for comparison. The model is left as it was, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, SerializeAsAny, model_validator

from spunge.data.query import Query
from spunge.data.rows import read_rows
from spunge.data.split import draw, seed_for
from spunge.data.tables import taken
from spunge.errors import RecipeError
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench, Evaluator, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings, EvaluatorSettings, evaluation_name
from spunge.recipe.named import named
from spunge.recipe.rows import Sources
from spunge.recipe.schema import Recipe
from spunge.registry import ATTACKS

OWN = ("source", "where", "limit", "by", "subject")  # settings of rows of the audit's own, which not every attack reads


class AuditSettings(EvaluatorSettings):
    kind: str = "audit"
    attack: Annotated[SerializeAsAny[AttackSettings], named(ATTACKS, "kind")] = Field(
        description="Name of the attack (`spunge list attacks`), or {kind: its name, ...} with its settings."
    )
    of: str | None = Field(None, description="Name of the evaluation that is measured again, which most attacks do.")
    label: str | None = Field(
        None, description="What metrics call the attack, where two attacks' would be called the same."
    )
    source: Sources | None = Field(
        None, description="Rows that the attack reads itself: file, folder, glob, {hub: ..}, or a list of them."
    )

    @model_validator(mode="before")
    @classmethod
    def _names_itself(cls, values: Any) -> Any:
        """By default an audit is called by what it does: `relearn capitals`."""
        if not isinstance(values, Mapping) or values.get("name") is not None:
            return values
        attack = values.get("attack")
        kind = str((attack.get("kind") if isinstance(attack, Mapping) else attack) or "")
        words = [kind.rpartition(".py:")[2], str(values.get("of") or "")]
        return {**values, "name": " ".join(word for word in words if word) or None}

    @model_validator(mode="after")
    def _makes_sense(self) -> "AuditSettings":
        kind, attack = self.attack.kind, ATTACKS.get(self.attack.kind)
        if (self.of is not None) != attack.of:
            raise RecipeError(
                f"evaluate.of: missing; name the evaluation that attack {kind} measures again"
                if attack.of
                else f"evaluate.of: attack {kind} measures nothing again; it reads {attack.rows} (source)"
            )
        if not attack.of and self.source is None and self.where is None:
            raise RecipeError(f"evaluate.source: missing; attack {kind} needs {attack.rows}")
        whose = f"items and subjects are those of {self.of!r}" if attack.of else "its subjects are the parts"
        for setting in OWN:
            if dict(self)[setting] is not None and setting not in attack.reads:
                raise RecipeError(f"evaluate.{setting}: attack {kind} has no use for it; {whose}")
            if attack.of and self.source is None and dict(self)[setting] is not None:
                raise RecipeError(f"evaluate.{setting}: attack {kind} reads no rows without a source; add source")
        return self


def measure(base: Base, settings: AuditSettings, items: pa.Table, bench: Bench) -> list[Measure]:
    """How much of what was forgotten comes back after an attack: relearning, quantisation, other prompts, probes."""
    measured = settings if settings.of is None else bench.settings_of[settings.of]
    target = Target(measured, items, settings.label, rows_beside(settings))
    under = ATTACKS.get(settings.attack.kind).run(base, settings.attack, target, bench)
    return [replace(each, attack=settings.attack.kind, label=settings.label) for each in under]


def columns(settings: AuditSettings, forget: Mapping[str, str]) -> dict[str, str]:
    return ATTACKS.get(settings.attack.kind).columns(settings.attack, forget)


def rows_beside(settings: AuditSettings) -> pa.Table | None:
    """Rows of the audit's own source beside the evaluation's items. Raises RecipeError as for any source."""
    if settings.of is None or settings.source is None:
        return None
    query = Query(read_rows(settings.source, "evaluate.source"))
    rows = draw(query.where(settings.where, "evaluate.where"), settings.limit, seed_for(0, "items"))
    return taken(query.project(columns(settings, {}), "evaluate.attack."), rows)


def instrument(settings: AuditSettings) -> dict[str, Any]:
    """What the attack measures with, and its version where that is not the first."""
    described = ATTACKS.get(settings.attack.kind).instrument(settings.attack, rows_beside(settings))
    version = ATTACKS.version(settings.attack.kind)
    return described if version == "1" else {**described, "attack version": version}


def check(settings: AuditSettings, recipe: Recipe) -> None:
    """Raises RecipeError for an evaluation that the attack cannot measure again."""
    others = {evaluation_name(entry): entry for entry in recipe.evaluate}
    other = others[settings.of] if settings.of is not None else None
    if isinstance(other, AuditSettings):
        raise RecipeError(
            f"evaluate.of: {settings.of!r} is an audit itself; name the evaluation that it measures again"
        )
    ATTACKS.get(settings.attack.kind).check(settings.attack, other, recipe)


AUDIT = Evaluator(
    settings=AuditSettings,
    source="Lynch et al. 2024, arXiv 2402.16835",
    measure=measure,
    columns=columns,
    instrument=instrument,
    of=lambda settings: settings.of,
    unseen=lambda settings: ATTACKS.get(settings.attack.kind).unseen,
    check=check,
    whole=lambda settings: f"attack {settings.attack.kind}" if ATTACKS.get(settings.attack.kind).whole else "",
    rereads=True,
    uses_samples=True,
    version=2,  # measures say which attack they are under
)
