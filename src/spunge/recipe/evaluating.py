"""What models are judged by: the settings that every evaluator and every attack has."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from spunge.errors import suggestion
from spunge.recipe.block import Strict
from spunge.recipe.rows import Sources
from spunge.registry import EVALUATORS

Half = Literal["validation", "test"]


class EvaluatorSettings(Strict):
    kind: str = Field(description="Name of the evaluator (`spunge list evaluators`).")
    name: str | None = Field(None, description="What to call this evaluation in files and logs. Default: its kind.")
    source: Sources | None = Field(
        None, description="File, folder, glob, {hub: ..}, or a list of them. Default: forget's."
    )
    where: str | None = Field(None, description="SQL condition that a row must meet.")
    limit: int | None = Field(
        None,
        ge=1,
        description="At most so many rows, drawn at random of those that count for a subject: the same ones whatever the seed, in "
        "every evaluation of the same rows.",
    )
    half: Half | None = Field(
        None,
        description="Measure one half of its items, each subject's in half: validation to choose settings by, test to judge them "
        "by. The same halves whatever the seed. `spunge tune` sets it. Default: all items.",
    )
    by: str | None = Field(
        None,
        description="Column or SQL expression that names each row's subject. Default: split.by where the rows have it.",
    )
    subject: str | None = Field(
        None,
        description="Name under which all rows together are reported. Default: `all` where the rows have no subjects; where some "
        "have, the others are not measured.",
    )
    group: Literal["forget", "keep"] | None = Field(
        None,
        description="What its rows are: to forget, such as benchmark questions about it, or to be kept; it decides which way is "
        "good. Default: subjects that are values of the split are to be forgotten, others kept.",
    )
    stages: list[str] | None = Field(
        None, description="Judge these alone, such as [base, merged, 'control:*', 'branch:*']. Default: every stage."
    )


# Settings that say which items an evaluation has and what it is called: for these stands the items' own hash.
ITEM_SETTINGS = frozenset(EvaluatorSettings.model_fields) - {"kind"}


class AttackSettings(Strict):
    kind: str = Field(description="Name of the attack (`spunge list attacks`).")


def refuse_stages(entry: EvaluatorSettings, known: Sequence[str]) -> None:
    """Raises ValueError for a name of a stage that the recipe will not have. known: those it will or may have, but for branches."""
    kinds = [f"{kind}:" for kind in ("control", "reference", "model")]  # of which there may be none
    for pattern in entry.stages or ():
        marked = any(mark in pattern for mark in "*?[")
        if pattern.startswith("branch:"):
            continue  # which branches there are depends on the rows
        if not any(fnmatchcase(name, pattern) for name in [*known, *(kinds if marked else ())]):
            unknown = f"no stage is called {pattern!r}{suggestion(pattern, known)}"
            raise ValueError(
                f"evaluate.stages: {evaluation_name(entry)!r}: {unknown}; there are {', '.join(known)} and branch:SLUG"
            )


def evaluation_name(entry: EvaluatorSettings) -> str:
    return entry.name or entry.kind


def measured_again(entry: EvaluatorSettings) -> str | None:
    """Name of the evaluation whose items an evaluation measures again, after an attack."""
    return EVALUATORS.get(entry.kind).of(entry)


def measured_by(name: str, evaluations: Mapping[str, EvaluatorSettings], setting: str) -> EvaluatorSettings:
    """The evaluation that something else than the judging is to measure by. setting: the block that names it.

    Raises ValueError where there is none, and for one that only judges.
    """
    entry = evaluations.get(name)
    if entry is None:
        raise ValueError(f"{setting}.evaluation: no evaluation is called {name!r}{suggestion(name, evaluations)}")
    evaluator = EVALUATORS.get(entry.kind)
    if measured_again(entry) is not None or not evaluator.reads_rows or evaluator.compares_texts:
        why = "measures another one again" if measured_again(entry) else "brings items of its own"
        why = "compares with what the base wrote" if evaluator.compares_texts else why
        raise ValueError(f"{setting}.evaluation: {name!r} ({entry.kind}) {why}; name another")
    return entry
