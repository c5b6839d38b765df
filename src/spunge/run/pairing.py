"""Several runs' items beside each other: how far one stage lies from the first run's, paired by item."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spunge.errors import RecipeError, first_line
from spunge.evaluation.evaluator import Measure
from spunge.report.comparison import Comparison, Finished, Paired
from spunge.run.by_metric import Measured, MetricKey, measured
from spunge.run.groups import directions_of
from spunge.run.measured import read_measured
from spunge.run.scoring import differences
from spunge.run.stages.building import Run, build
from spunge.run.status import run_recipe

Stage = dict[MetricKey, Measured]


class _Items(NamedTuple):
    """Of the first run: its stages, and the values that it was to forget."""

    begun: Run
    parts: set[str]


def with_pairs(compared: Comparison) -> Comparison:
    """The comparison with its items paired. Reads the first run's rows, which say what each item is about.

    Where they cannot be read, are others by now, or a run no longer holds its items' measurements, a remark says so.
    """
    first = compared.runs[0]
    try:
        items = _items(first)
        known = _measured(items, compared.stage, first)
    except (RecipeError, OSError) as error:
        return compared._replace(remarks=(f"nothing is paired by item: {first_line(error)}",))
    paired: list[Paired] = []
    remarks: list[str] = []
    for place, run in enumerate(compared.runs[1:], start=1):
        try:
            other = _measured(items, compared.stage, run)
        except (RecipeError, OSError) as error:
            remarks.append(f"{run.name!r} is not paired by item: {first_line(error)}")
            continue
        both = {run.name: other, "": {key: each for key, each in known.items() if key in other}}
        directions = directions_of(items.begun.base.evaluations, list(both.values()), items.parts)
        found = differences(run.name, "", both, directions)
        paired += [Paired(place, difference) for difference in found]
    return compared._replace(paired=tuple(paired), remarks=tuple(remarks))


def _items(run: Finished) -> _Items:
    folder = run.results.folder.resolve()
    begun = build(run_recipe(folder), folder)
    return _Items(begun, {part.value for part in begun.seeds[0].inputs.parts.parts})


def _measured(items: _Items, stage: str, run: Finished) -> Stage:
    """A run's measurements of a stage, by the first run's items. Raises RecipeError where the run does not hold them."""
    home, folder = items.begun.graph.folder, run.results.folder.resolve()
    evaluations = {each.name: each for each in run.results.evaluations}
    seeds: list[Mapping[str, Sequence[Measure]]] = []
    for judgings in items.begun.judgings:
        of_seed = {}
        for judging in judgings:
            entry = evaluations.get(judging.items.name)
            if judging.model.name != stage or entry is None:
                continue
            if entry.rows != judging.items.sha256[:12]:
                raise RecipeError(f"the items of {entry.name!r} are not what its rows are now")
            file = folder / judging.file.relative_to(home)
            if not file.is_file():
                raise RecipeError(f"{str(file)!r} is missing")
            of_seed[judging.items.name] = read_measured(file).measures
        if of_seed:
            seeds.append(of_seed)
    if run.results.seeds != len(items.begun.judgings):
        raise RecipeError(f"it has {run.results.seeds} seeds, and the first run {len(items.begun.judgings)}")
    _refuse_lengths(items, seeds)
    return measured(items.begun.base.evaluations, seeds)


def _refuse_lengths(items: _Items, seeds: Sequence[Mapping[str, Sequence[Measure]]]) -> None:
    """Raise RecipeError for measurements of another number of items, which would be paired with the wrong ones."""
    counts = {each.name: each.table.num_rows for each in items.begun.base.evaluations}
    for of_seed in seeds:
        for name, measures in of_seed.items():
            wrong = [
                len(each.numerator) for each in measures if each.subject is None and len(each.numerator) != counts[name]
            ]
            if wrong:
                raise RecipeError(f"{name!r} has {counts[name]} items, and its file holds {wrong[0]}")
