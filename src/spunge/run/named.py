"""What a recipe names of its evaluations must be there: metrics, subjects and stages. What names nothing is said before training.

Of some evaluations only measuring tells what they give; of these it is said when they have measured.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from spunge.data.items import Items
from spunge.errors import RecipeError, suggestion
from spunge.recipe.aggregates import figure_names
from spunge.recipe.evaluating import EvaluatorSettings, measured_again
from spunge.recipe.schema import Published, Recipe
from spunge.registry import EVALUATORS
from spunge.results import Higher, Row

WORST = "worst"  # the subject under which a metric's worst subject is reported
LISTED = 12  # names in a message


def judges(settings: EvaluatorSettings, stage: str) -> bool:
    """Whether an evaluation judges a stage."""
    return settings.stages is None or any(fnmatchcase(stage, pattern) for pattern in settings.stages)


def metrics_of(items: Items) -> Mapping[str, Higher] | None:
    """Every metric of an evaluation, and what a higher value says; None where only measuring tells."""
    tell = EVALUATORS.get(items.settings.kind).metrics
    return None if tell is None or measured_again(items.settings) is not None else tell(items.settings, items.table)


def unmeasured(metric: str, items: Items) -> str:
    """Why an evaluation gives no such metric, as far as that is known; nothing where it may."""
    known = metrics_of(items)
    return "" if known is None or metric in known else missing("measures no", metric, known, "measures")


def missing(what: str, name: str, known: Iterable[str], have: str) -> str:
    """`measures no 'acuracy'; did you mean 'accuracy'?; it measures accuracy, perplexity`."""
    names = list(known)
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return f"{what} {name!r}{suggestion(name, names)}; it {have} {listed or 'nothing'}"


def refuse_stages(evaluations: Sequence[Items], stages: Sequence[str]) -> None:
    """Raises RecipeError for an evaluation of a branch that there is not. Other stages' names are known from the recipe alone."""
    for items in evaluations:
        for name in items.settings.stages or ():
            if name.startswith("branch:") and not any(mark in name for mark in "*?[") and name not in stages:
                branches = [stage for stage in stages if stage.startswith("branch:")]
                raise RecipeError(
                    f"evaluate.stages: {items.name!r}: no stage is called {name!r}{suggestion(name, branches)}; the branches are "
                    f"{', '.join(branches[:LISTED]) or 'none'}"
                )


def refuse_twice(evaluations: Sequence[Items], stages: Sequence[str]) -> None:
    """Raises RecipeError where two evaluations will report one metric on one subject of one stage, as far as that is known
    before they measure."""
    by: dict[tuple[str, str, str], str] = {}
    for items in evaluations:
        for stage in [stage for stage in stages if judges(items.settings, stage)]:
            for metric in metrics_of(items) or ():
                for subject in items.subjects:
                    other = by.setdefault((stage, subject, metric), items.name)
                    if other != items.name:
                        raise RecipeError(
                            f"evaluate.subject: {other!r} and {items.name!r} both report {metric!r} on {subject!r}; give one of "
                            f'them subjects of its own, such as {{by: "NULL", subject: {items.name}}}'
                        )


def unmatched_figures(recipe: Recipe, evaluations: Sequence[Items], stages: Sequence[str]) -> Iterator[str]:
    """The published figures that nothing of this run will stand beside, as far as that is known before it measures: a remark."""
    lost = [told for entry in recipe.published if (told := _unmatched(entry, recipe, evaluations, stages))]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        yield f"published: nothing of this run stands beside {lost[0]}{more}"


def _unmatched(entry: Published, recipe: Recipe, evaluations: Sequence[Items], stages: Sequence[str]) -> str:
    """The figure and what of it is unknown; nothing where it may be met."""
    shown = f"{entry.stage}/{entry.subject}/{entry.metric}"
    if entry.stage not in stages:
        return f"{shown}: no stage is called {entry.stage!r}{suggestion(entry.stage, stages)}"
    metrics = {
        name for aggregate in recipe.aggregates for name in figure_names(aggregate, recipe.aggregates[aggregate])
    }
    if entry.metric in metrics:
        return ""
    subjects: set[str] = set()
    for items in evaluations:
        known = metrics_of(items)
        if known is None:
            return ""  # only measuring tells
        metrics |= known.keys()
        if entry.metric in known and judges(items.settings, entry.stage):
            subjects |= items.subjects.keys()
    if entry.metric not in metrics:
        return f"{shown}: no evaluation measures {entry.metric!r}{suggestion(entry.metric, metrics)}"
    if entry.subject in subjects or entry.subject.startswith((WORST, "least ")):
        return ""
    return f"{shown}: no subject {entry.subject!r} is measured there{suggestion(entry.subject, subjects)}"


def unmatched_rows(published: Sequence[Published], rows: Sequence[Row]) -> str:
    """How many published figures no row stands beside, in words; nothing where there is none."""
    there = {(row.stage, row.subject, row.metric) for row in rows}
    lost = [entry for entry in published if (entry.stage, entry.subject, entry.metric) not in there]
    if not lost:
        return ""
    first = lost[0]
    return (
        f"; nothing stands beside {len(lost)} of {len(published)} published figures (first: {first.stage}/{first.subject}/"
        f"{first.metric})"
    )
