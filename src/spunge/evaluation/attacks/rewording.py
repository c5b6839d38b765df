"""Other words: the same questions put differently. What was only hidden is found again.

Paraphrases as in Lynch et al. 2024, "Eight methods to evaluate robust unlearning" (arXiv 2402.16835), and Patil et al. 2023
(arXiv 2309.17410).

    - {kind: audit, of: capitals, attack: {kind: reword, templates: ["As everybody knows, {question}"]}}
    - {kind: audit, of: capitals, attack: reword, source: rewordings.jsonl}  # rows with original and reworded
"""

from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field

from spunge.data.samples import table_sha256
from spunge.errors import RecipeError
from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.attacks.variants import check_prompts, item_means, measured_over
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings

QUESTION = "{question}"
# The question stays last, so that a cloze still goes on with its candidates.
TEMPLATES = (
    "From an encyclopedia: {question}",
    "As everybody knows, {question}",
    "Here is an easy one for you. {question}",
    "In other words: {question}",
)


def _with_question(template: str) -> str:
    if QUESTION not in template:
        raise ValueError(f"put {QUESTION} where the question goes")
    return template


class RewordSettings(AttackSettings):
    kind: str = "reword"
    templates: list[Annotated[str, AfterValidator(_with_question)]] | None = Field(
        None,
        min_length=1,
        description="Wordings, with {question} where the question goes. Default: four plain ones, or the source's alone.",
    )
    original: str = Field(
        "original", description="Column or SQL expression of the source: the question as it is asked."
    )
    reworded: str = Field("reworded", description="Column or SQL expression of the source: the same in other words.")


def run(base: Base, attack: RewordSettings, target: Target, bench: Bench) -> list[Measure]:
    """Put the questions in other words and measure again: means over the wordings.

    Every metric of the evaluation, an item's value being its mean. Raises RecipeError where the rewordings lack a question,
    and for an evaluation without prompts.
    """
    given = by_question(target.rows) if target.rows is not None else None
    templates = attack.templates or (TEMPLATES if given is None else ())
    questions = target.prompts
    missing = [question for question in questions if question.strip() not in given] if given is not None else []
    if missing:
        raise RecipeError(
            f"evaluate.source: {len(missing)} of the {len(questions)} questions have no rewording (first: {missing[0]!r})"
        )
    variants = [
        [
            *(template.replace(QUESTION, question) for template in templates),
            *(given[question.strip()] if given is not None else ()),
        ]
        for question in questions
    ]
    return [target.again(measure, "reworded") for measure in item_means(*measured_over(base, target, bench, variants))]


def columns(attack: RewordSettings, _forget: Mapping[str, str]) -> dict[str, str]:
    return {"original": attack.original, "reworded": attack.reworded}


def instrument(_attack: RewordSettings, rows: pa.Table | None) -> dict[str, Any]:
    """The rewordings' content, which is read from a file of the audit's own."""
    return {} if rows is None else {"rewordings": table_sha256(rows)}


def by_question(table: pa.Table) -> dict[str, list[str]]:
    """Question -> its rewordings."""
    others: dict[str, list[str]] = {}
    for row in table.to_pylist():
        others.setdefault(str(row["original"]).strip(), []).append(str(row["reworded"]))
    return others


REWORD = Attack(
    settings=RewordSettings,
    source="Lynch et al. 2024, arXiv 2402.16835; Patil et al. 2023, arXiv 2309.17410",
    run=run,
    reads=frozenset({"source", "where"}),
    rows="questions and the same in other words",
    columns=columns,
    instrument=instrument,
    check=check_prompts,
)
