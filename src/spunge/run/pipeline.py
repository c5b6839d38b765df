"""Make the stages of a run that its folder does not hold yet, each after those that it needs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from spunge.files import disk_errors_told
from spunge.progress import SILENT, Watcher
from spunge.recipe.loading import load_recipe
from spunge.recipe.schema import Recipe
from spunge.registry import EXECUTORS
from spunge.results import Results, read_results
from spunge.run.aggregates import refuse_aggregates
from spunge.run.decoding import refuse_other_tokens
from spunge.run.executors.executor import Team
from spunge.run.folder import claimed, default_folder, refuse_replacing
from spunge.run.graph import NotMadeError
from spunge.run.groups import refuse_mixed
from spunge.run.judge import refuse_items
from spunge.run.live import told_in
from spunge.run.media import refuse_media
from spunge.run.merge import refuse_merges
from spunge.run.moments import refuse_moments
from spunge.run.named import refuse_stages, refuse_twice, unmatched_figures
from spunge.run.schedule import Schedule, make_all
from spunge.run.space import refuse_full
from spunge.run.stages.building import Run, build
from spunge.run.stages.naming import RunGraph
from spunge.run.stages.unfinished import refuse_losing, unjudged, untaught, untrained, unwatched
from spunge.run.stamps import faults
from spunge.run.status import recipe_file
from spunge.run.teach import refuse_lessons
from spunge.run.texts import bring_back, drop_texts, note_rows
from spunge.run.tracking import refuse_tracker, tracked
from spunge.run.train import refuse_rows
from spunge.run.unseen import refuse_seen
from spunge.run.watching import refuse_watch
from spunge.temporary import remove_left


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
    replace: bool = False,
    others: Sequence[str | Path] = (),
) -> Results:
    """Do everything that a recipe asks for and that its folder does not hold yet.

    recipe: a Recipe, a mapping, a YAML file or a shipped recipe's name. out: the run's folder, `runs/NAME` by default.
    replace: finished trainings in that folder that no longer fit may be made again. others: folders of runs; what they hold
    that this one would make alike is taken from them. Raises RecipeError when the recipe, its data or a folder is wrong.
    """
    watcher = watcher or SILENT
    folder = Path(out or default_folder(recipe)).resolve()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    runs = [Path(other).resolve() for other in others]
    for other in runs:
        recipe_file(other)  # not loaded: a recipe may name code, and what is taken is told by its key
    remove_left()
    with disk_errors_told(folder), claimed(folder), told_in(folder, watcher) as watcher:
        if not replace:
            refuse_replacing(folder, recipe)
        begun = begin(recipe, folder, watcher)
        if not replace:
            refuse_losing(begun)
        with tracked(recipe, folder, watcher) as told, team_of(begun, told) as team:
            results = finish(begun, team, told, replace, [other for other in runs if other != folder])
            told.results(results)
        return results


def begin(recipe: Recipe, folder: Path, watcher: Watcher, written: bool = True) -> Run:
    """The run's stages, with every key that can be found: what is wrong is said now, not after the training.

    written: the merged model becomes a checkpoint.
    """
    watcher.begin("read and split the rows")
    EXECUTORS.get(recipe.execution.kind).room(recipe)
    refuse_tracker(recipe)
    begun = build(recipe, folder, written)
    inputs = begun.seeds[0].inputs
    sizes = ", ".join(f"{part.value}: {len(part.samples)}" for part in inputs.parts.parts)
    watcher.end("; ".join([sizes, *inputs.notes]))
    watcher.begin("fingerprint the base")
    # Before any key: in what all models are judged depends on what is downloaded here.
    for model in begun.seeds[0].models:
        if model.given is not None:
            model.given.refuse(begun.base)
    refuse_other_tokens(begun.base)
    for name in begun.graph.stages:
        with suppress(NotMadeError):
            begun.graph.key(name)
    remarks = refuse_wrong(begun)
    there = begun.graph.state("base").done
    watcher.end(begun.base.weights[:12] if there else "")
    note_rows(folder)
    bring_back(begun, watcher)
    for remark in dict.fromkeys(remarks):
        watcher.begin("note")
        watcher.end(remark)
    return begun


def refuse_wrong(begun: Run) -> list[str]:
    """Remarks on the rows, items and stages of a run. Raises RecipeError for those that cannot be what they are given for. The
    model must be here; no weights are loaded."""
    recipe, base, inputs = begun.recipe, begun.base, begun.seeds[0].inputs
    refuse_media(inputs)
    refuse_merges(begun.seeds)
    refuse_moments(begun.seeds[0])
    remarks = refuse_lessons(untaught(begun), base)
    remarks += [remark for line in untrained(begun) for remark in refuse_rows(line.inputs)]
    watched = [items for line in untrained(begun) for items in refuse_watch(line.inputs, line.trainings)]
    _ = base.instruments  # a scorer or an encoder that cannot be had is refused
    refuse_items([*(judging.items for judging in unjudged(begun)), *watched, *base.calibration_items], base)
    stages = [model.name for model in begun.seeds[0].models]
    refuse_stages(base.evaluations, stages)
    refuse_twice(base.evaluations, stages)
    refuse_aggregates(recipe.aggregates, base.evaluations, stages)
    refuse_seen(base.evaluations, base)
    remarks += refuse_mixed(base.evaluations, inputs.parts.values)
    remarks += unmatched_figures(recipe, base.evaluations, stages)
    return remarks + list(unwatched(begun))


def team_of(begun: Run, watcher: Watcher) -> AbstractContextManager[Team]:
    """Those who make the stages of a run, as its recipe says, and then of others like it."""
    execution = begun.recipe.execution
    return EXECUTORS.get(execution.kind).team(execution, begun, watcher)


def finish(begun: Run, team: Team, watcher: Watcher, replace: bool = False, others: Sequence[Path] = ()) -> Results:
    """Make what the run's folder does not hold yet. others: folders of runs that finished stages of the same key are taken from."""
    finish_all([Schedule(begun, watcher, replace, others)], team, watcher)
    return read_results(begun.graph.folder)


def finish_all(schedules: Sequence[Schedule], team: Team, watcher: Watcher) -> None:
    """The same of some runs beside one another. One whose own settings are wrong holds why, and has no results."""
    for schedule in schedules:
        schedule.take_finished()
        refuse_full(schedule.begun, list(schedule.begun.graph.to_do()), "what is still to be made")
    make_all(schedules, team, watcher)
    for schedule in schedules:
        if schedule.refused is None:
            drop_texts(schedule.folder, schedule.begun.recipe.keep_texts)
            _tell_byproducts(schedule.begun.graph, watcher)


def _tell_byproducts(graph: RunGraph, watcher: Watcher) -> None:
    """Say which logs are not as they were written; nothing is made again for them."""
    for name in graph.stages:
        stamp = graph.state(name).stamp
        for fault in faults(graph.folder, stamp, byproducts=True) if stamp else ():
            watcher.begin(f"{name} is kept")
            watcher.end(f"{fault}, but nothing depends on it")
