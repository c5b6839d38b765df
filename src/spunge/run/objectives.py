"""What a search is for: scores of the merged model, named by evaluation, metric and subject."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spunge.data.items import EVERYTHING, Items
from spunge.errors import RecipeError, suggestion
from spunge.recipe.aggregates import HarmonicMean, figure_names, terms_of
from spunge.recipe.calibration import calibrated_by
from spunge.recipe.evaluating import EvaluatorSettings, evaluation_name, measured_again
from spunge.recipe.schema import Recipe
from spunge.registry import EVALUATORS
from spunge.results import Results, Row, Wanted, merit
from spunge.run.aggregates import Aggregate
from spunge.run.named import WORST, missing, unmeasured
from spunge.run.scoring import WORST_KNOWN

FORM = "EVALUATION/METRIC/SUBJECT"


@dataclass(frozen=True)
class Objective:
    """A score that a search makes as good as it can."""

    evaluation: str
    metric: str
    subject: str

    @property
    def name(self) -> str:
        return f"{self.evaluation}/{self.metric}/{self.subject}"

    def row(self, results: Results, stage: str = "merged") -> Row | None:
        """Its row at a stage; None where it was not measured."""
        asked = (stage, self.evaluation, self.metric, self.subject)
        rows = (row for row in results.rows if (row.stage, row.evaluation, row.metric, row.subject) == asked)
        return next(rows, None)


def objectives_of(texts: Sequence[str], recipe: Recipe) -> tuple[Objective, ...]:
    """Two objectives, each in a text or both in one, between them a comma.

    Raises RecipeError where the recipe has no such evaluation, or one that cannot be halved.
    """
    names = [*(evaluation_name(entry) for entry in recipe.evaluate), *recipe.aggregates]
    # A metric may hold a comma: one that parts two objectives is followed by an evaluation or an aggregate.
    between = re.compile(rf",\s*(?=(?:{'|'.join(map(re.escape, names)) or '$^'})(?:/|,|\s*$))")
    asked = [each.strip() for text in texts for each in between.split(text) if each.strip()]
    objectives = tuple(_objective(each, recipe, names) for each in asked)
    if len(set(objectives)) != 2 or len(objectives) != 2:
        shown = f"{', '.join(asked)}: " if asked else ""
        raise RecipeError(f"--objectives: {shown}give two that differ, each as {FORM} or the name of an aggregate")
    for objective in objectives:
        _refuse_unhalved(objective, recipe)
    return objectives


def _objective(text: str, recipe: Recipe, names: Sequence[str]) -> Objective:
    if text in recipe.aggregates:
        return Objective(text, text, EVERYTHING)
    evaluation = max((name for name in names if text.startswith(f"{name}/")), key=len, default=None)
    if evaluation is None:
        given = text.partition("/")[0]
        raise RecipeError(
            f"--objectives: {text!r}: no evaluation or aggregate is called {given!r}{suggestion(given, names)}"
        )
    metric, slash, subject = text[len(evaluation) + 1 :].partition("/")
    if evaluation in recipe.aggregates and metric and not slash:
        if metric not in (names := figure_names(evaluation, recipe.aggregates[evaluation])):
            raise RecipeError(
                f"--objectives: the aggregate {evaluation!r} {missing('gives no', metric, names, 'gives')}"
            )
        return Objective(evaluation, metric, EVERYTHING)
    if not (metric and slash and subject):
        raise RecipeError(f"--objectives: {text!r} is not of the form {FORM}")
    return Objective(evaluation, metric, subject)


def needed(objectives: Sequence[Objective], recipe: Recipe) -> list[EvaluatorSettings]:
    """The evaluations that give the objectives, those that these measure again, and that which scales are calibrated by."""
    by_name = {evaluation_name(entry): entry for entry in recipe.evaluate}
    names = {objective.evaluation for objective in objectives} & by_name.keys()
    names |= {term.evaluation for each in aggregates_of(objectives, recipe).values() for term in terms_of(each)}
    names |= set(calibrated_by(recipe.calibrate, recipe.aggregates))
    names |= {of for name in names if (of := measured_again(by_name[name])) is not None}
    return [entry for name, entry in by_name.items() if name in names]


def aggregates_of(objectives: Sequence[Objective], recipe: Recipe) -> dict[str, Aggregate]:
    """The recipe's aggregates that are objectives."""
    names = {objective.evaluation for objective in objectives}
    return {name: each for name, each in recipe.aggregates.items() if name in names}


def compared_with(objectives: Sequence[Objective], recipe: Recipe) -> list[str]:
    """The stages that aggregates compare with."""
    aggregates = aggregates_of(objectives, recipe).values()
    return [each.against for each in aggregates if not isinstance(each, HarmonicMean)]


def halvable(entry: EvaluatorSettings) -> bool:
    """Whether an evaluation has items of its own rows."""
    return EVALUATORS.get(entry.kind).reads_rows and measured_again(entry) is None


def _refuse_unhalved(objective: Objective, recipe: Recipe) -> None:
    """Raises RecipeError for an objective without a half to choose by and another to judge by."""
    for entry in needed([objective], recipe):
        if entry.half is not None:
            raise RecipeError(
                f"evaluate.half: {evaluation_name(entry)!r} is halved already, which `spunge tune` does; leave half out"
            )
        if measured_again(entry) is None and not halvable(entry):
            raise RecipeError(
                f"--objectives: {objective.name!r}: {evaluation_name(entry)!r} brings items of its own, which cannot be halved "
                "into some to choose by and some to judge by; name an evaluation of rows"
            )


def refuse_unmeasured(objectives: Sequence[Objective], evaluations: Sequence[Items]) -> None:
    """Raises RecipeError for a metric or subject that an evaluation will not give, as far as that is known before it measures."""
    by_name = {items.name: items for items in evaluations}
    for objective in objectives:
        items = by_name.get(objective.evaluation)
        if items is None or measured_again(items.settings) is not None:
            continue
        if why := unmeasured(objective.metric, items):
            raise RecipeError(f"--objectives: {objective.evaluation!r} {why}")
        if objective.subject not in items.subjects and not objective.subject.startswith((WORST, *WORST_KNOWN.values())):
            raise RecipeError(_unknown(objective, "has no", objective.subject, list(items.subjects)))


def _unknown(objective: Objective, what: str, name: str, known: Sequence[str]) -> str:
    return f"--objectives: {objective.evaluation!r} {what} {name!r}{suggestion(name, known)}"


class Way(NamedTuple):
    """Which way is good. target: what a value should be near, where that is what is wanted."""

    wanted: Wanted
    target: float | None = None

    def sought(self, value: float) -> float:
        """What a search makes as high (`up`) or as low as it can: the value, or its distance from the target."""
        return -merit(value, self.wanted, self.target) if self.wanted == "near" else value


def directions(objectives: Sequence[Objective], results: Results) -> tuple[Way, ...]:
    """Which way is good of each, as the base's rows say. Raises RecipeError for what is not measured or has no good way."""
    return tuple(_direction(objective, results) for objective in objectives)


def _direction(objective: Objective, results: Results) -> Way:
    row = objective.row(results, "base")
    if row is not None and row.wanted is not None:
        return Way(row.wanted, row.target)
    rows = [row for row in results.rows if row.stage == "base" and row.evaluation == objective.evaluation]
    if row is not None:
        good = [other.subject for other in rows if other.metric == objective.metric and other.wanted is not None]
        instead = f"name one of {', '.join(good)}" if good else "name another metric"
        raise RecipeError(f"--objectives: {objective.name!r}: neither way is good of it; {instead}")
    metrics = list(dict.fromkeys(row.metric for row in rows))
    if objective.metric not in metrics:
        raise RecipeError(_unknown(objective, "measures no", objective.metric, metrics))
    subjects = [row.subject for row in rows if row.metric == objective.metric]
    raise RecipeError(_unknown(objective, "has no", objective.subject, subjects))
