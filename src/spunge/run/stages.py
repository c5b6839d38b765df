"""Which stages a recipe asks for: the graph of a run, for every seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spunge.data.selection import split_content
from spunge.errors import RecipeError
from spunge.files import fingerprint, write_json, write_text
from spunge.merging.earlier import unfinished
from spunge.recipe.loading import dump_recipe
from spunge.recipe.schema import Recipe, measured_again
from spunge.registry import METHODS
from spunge.results import UNTAUGHT
from spunge.run.calibrate import Calibration, calibrate, calibrate_base, calibration_inputs
from spunge.run.costs import (
    calibration_cost,
    conversion_cost,
    judging_cost,
    merging_cost,
    teaching_cost,
    teaching_steps,
    training_cost,
    training_steps,
)
from spunge.run.folder import identity
from spunge.run.given import Given
from spunge.run.graph import Graph, Made, NotMadeError, Stage
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.judge import Judging, evaluation_folder, judge, judging_inputs
from spunge.run.merge import convert_base, merge_branches, merged_inputs
from spunge.run.models import Lineup, Model, Training, calibration_file, lineup
from spunge.run.outcome import write_report, write_scores
from spunge.run.session import Session
from spunge.run.stamps import Stamp
from spunge.run.teach import RETRAIN, TEACH, Teaching, make_taught, teaching_inputs, teachings
from spunge.run.train import SETTLED, STATES, flattened, settle, settle_inputs, train, training_inputs, undecided

RunGraph = Graph[Session]


@dataclass(frozen=True)
class Run:
    """A recipe's stages in its folder. `base`, `seeds`: what they are made from; `judgings`: of each seed."""

    recipe: Recipe
    graph: RunGraph
    base: BaseInputs
    seeds: Sequence[Lineup]
    judgings: Sequence[Sequence[Judging]]

    @property
    def makes_base(self) -> tuple[str, ...]:
        """The stages that make the files of the base."""
        return tuple(name for name in ("conversion", TEACH) if name in self.graph.stages)


def lineups(recipe: Recipe, folder: Path, written: bool = True) -> list[Lineup]:
    """What is trained and judged, for each seed: the first in RUN itself, the others in RUN/seeds/SEED. written: the merged model
    is."""
    base = BaseInputs(recipe, folder)
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    recipes = [recipe, *(recipe.model_copy(update={"seed": seed, "seeds": 1}) for seed in seeds[1:])]
    folders = [folder, *(folder / "seeds" / str(seed) for seed in seeds[1:])]
    return [lineup(SeedInputs(each, base), own, written) for each, own in zip(recipes, folders, strict=True)]


def build(recipe: Recipe, folder: Path, written: bool = True) -> Run:
    """The graph of a recipe in its folder. Reads and splits the rows. Raises RecipeError where they are wrong. written: the merged
    model becomes a checkpoint."""
    graph: RunGraph = Graph(folder)
    seeds = lineups(recipe, folder, written)
    base = seeds[0].inputs.base
    _add_base(graph, seeds[0].inputs)
    judgings: list[list[Judging]] = []
    against = _add_base_calibration(graph, seeds[0])
    for number, line in enumerate(seeds):
        mark = _mark(number, line)
        _add_recipe(graph, line, mark)
        _add_trainings(graph, line, mark)
        _add_calibrations(graph, line, mark, against)
        _add_models(graph, line, mark)
        judgings.append(_add_judgings(graph, line, mark, evaluation_folder(folder, "base")))
    made = [stage.name for stage in graph.stages.values() if stage.make is not None]
    about = recipe.model_dump(mode="json", include={"published", "evaluate", "aggregates"})
    graph.add(
        Stage(
            "results",
            "results",
            needs=tuple(made),
            inputs=lambda: {"recipe": fingerprint(about)},
            files=("results.json",),
            make=lambda session: write_scores(recipe, graph, seeds, judgings, session),
        )
    )
    graph.add(
        Stage("page", "page", needs=("results",), files=("report.html",), make=lambda session: write_report(folder))
    )
    return Run(recipe, graph, base, seeds, judgings)


def refuse_losing(run: Run) -> None:
    """Raises RecipeError where finished trainings no longer fit the recipe, its rows or the base, and would be made again."""
    if lost := losing(run):
        raise RecipeError(
            f"--out: {str(run.graph.folder)!r} holds finished trainings that no longer fit ({lost}); give --replace to train "
            "them again, or another folder"
        )


def _trained(stamp: Stamp) -> bool:
    """Whether training went into what a stamp vouches for; what another tool made is taken again at no cost."""
    name = stamp.inputs.get("unlearn.method")
    return name not in METHODS.names() or METHODS.get(name).trains


def losing(run: Run) -> str:
    """Which finished trainings would be made again, and why; empty where none would."""
    stages = [teaching.name for teaching in teachings(run.seeds[0].inputs)] + [
        _mark(number, line) + training.name for number, line in enumerate(run.seeds) for training in line.trainings
    ]
    states = {name: run.graph.state(name) for name in stages}
    lost = [
        f"{name}: {state.why}"
        for name, state in states.items()
        if state.kind == "stale" and state.stamp and _trained(state.stamp) and not run.graph.faults(state.stamp)
    ]
    return f"{lost[0]}{f', and {len(lost) - 1} more' if len(lost) > 1 else ''}" if lost else ""


def untrained(run: Run) -> list[Lineup]:
    """The seeds of which some training is still to be made."""
    return [
        line
        for number, line in enumerate(run.seeds)
        if any(not run.graph.state(_mark(number, line) + training.name).done for training in line.trainings)
    ]


def untaught(run: Run) -> list[Teaching]:
    """The teachings that are still to be made."""
    return [teaching for teaching in teachings(run.seeds[0].inputs) if not run.graph.state(teaching.name).done]


def unjudged(run: Run) -> list[Judging]:
    """The judgings that are still to be made, of all seeds."""
    return [
        judging
        for number, (line, judgings) in enumerate(zip(run.seeds, run.judgings, strict=True))
        for judging in judgings
        if not run.graph.state(judging_name(judging, _mark(number, line))).done
    ]


def _mark(number: int, line: Lineup) -> str:
    """What the stages' names of a further seed begin with."""
    return f"seed-{line.inputs.recipe.seed}:" if number else ""


def _titled(title: str, mark: str) -> str:
    """A stage's title, with its seed where it is of a further one."""
    return f"{title} ({mark.rstrip(':')})" if mark else title


def _add_base(graph: RunGraph, inputs: SeedInputs) -> None:
    """The base itself, nothing to make but for pickled or quantised weights, which are converted, and for what is taught; and what
    stands beside it."""
    base = inputs.base
    needs: tuple[str, ...] = ()
    if base.local and base.conversion is not None:
        needs = ("conversion",)
        graph.add(
            Stage(
                "conversion",
                "convert the base",
                inputs=lambda: {"files": base.unconverted},
                files=("base/**",),
                cost=lambda: conversion_cost(base),
                make=lambda session: convert_base(base),
            )
        )
    if taught := teachings(inputs):
        graph.add(_given_model(graph, UNTAUGHT, needs, lambda: base.key_of(base.untaught)))
        needs = (TEACH,)
    for teaching in taught:
        graph.add(_teaching(graph, teaching, base))
    graph.add(_given_model(graph, "base", needs, lambda: base.key))
    if (asked := inputs.recipe.reference) is not None and asked.path is None:
        name = f"reference:{asked.name}"
        graph.add(_given_model(graph, name, (RETRAIN,), lambda: base.key_of(base.retrained)))


def _given_model(graph: RunGraph, name: str, needs: tuple[str, ...], key: Callable[[], str]) -> Stage[Session]:
    """A model that training and judging begin from, known by its content. needs: the stage that makes its files, if any."""

    def inputs() -> Mapping[str, Any]:
        for need in needs:
            if not graph.state(need).done:
                raise NotMadeError(f"{need!r} to be made")
        return {"base": key()}

    return Stage(name, f"the {name} model" if name != "base" else "the base", needs=needs, inputs=inputs)


def _judged_as_it_is(graph: RunGraph, name: str, given: Given, base: BaseInputs) -> Stage[Session]:
    """A model that is judged and that nothing is made of."""

    def inputs() -> Mapping[str, Any]:
        if not given.here:
            raise NotMadeError(f"{given.path!r} to be downloaded")
        key = {"model": given.key(base)}
        return key if given.whole else {**key, "base": graph.key("base")}

    return Stage(name, given.path, inputs=inputs)


def _teaching(graph: RunGraph, teaching: Teaching, base: BaseInputs) -> Stage[Session]:
    return Stage(
        teaching.name,
        "teach the base" if teaching.name == TEACH else "teach the reference",
        needs=(UNTAUGHT,),
        inputs=lambda: teaching_inputs(teaching, base),
        files=tuple(_inside(graph, [teaching.folder / "**"])),
        passing=tuple(_inside(graph, [teaching.work / STATES, teaching.work / "delta"])),
        make=lambda session: make_taught(teaching, base, graph.key(teaching.name), session),
        cost=lambda: teaching_cost(teaching, base),
        told=f"teach {len(teaching.samples)} rows ({teaching_steps(teaching)} steps)",
    )


def _add_recipe(graph: RunGraph, line: Lineup, mark: str) -> None:
    """recipe.yaml and split.json, which say what the run is."""
    inputs = line.inputs
    text, split = (
        dump_recipe(inputs.recipe),
        split_content(inputs.parts, inputs.retained, inputs.base.lesson, inputs.reference),
    )
    files = [line.folder / "recipe.yaml", line.folder / "split.json"]

    def write(session: Session) -> Made:
        write_text(files[0], text)
        write_json(files[1], split)
        return Made(files)

    graph.add(
        Stage(
            f"{mark}recipe",
            _titled("recipe and split", mark),
            inputs=lambda: {**identity(line.inputs.recipe), "recipe": fingerprint(text), "split": fingerprint(split)},
            files=tuple(_inside(graph, files)),
            make=write,
        )
    )


def _add_trainings(graph: RunGraph, line: Lineup, mark: str) -> None:
    if not line.trainings:
        return
    unlearn = line.inputs.unlearn
    settled = f"{mark}settled"
    if names := undecided(unlearn):
        graph.add(
            Stage(
                settled,
                _titled(f"choose unlearn.{', '.join(names)}", mark),
                needs=("base",),
                inputs=lambda: settle_inputs(line.inputs, unlearn),
                files=tuple(_inside(graph, [line.folder / SETTLED])),
                make=lambda session: settle(line, session),
            )
        )
    for training in line.trainings:
        graph.add(_training(graph, line, training, mark, settled if names else None))


def _training(graph: RunGraph, line: Lineup, training: Training, mark: str, settled: str | None) -> Stage[Session]:
    name = mark + training.name

    def inputs() -> Mapping[str, Any]:
        # The choice itself enters the key, not what it was made from: one that is made again may turn out otherwise.
        if settled is not None and not graph.state(settled).done:
            raise NotMadeError(f"unlearn.{', unlearn.'.join(undecided(line.inputs.unlearn))} to be chosen")
        return training_inputs(training, line)

    needs = ("base", *([mark + training.after.name] if training.after else []))
    return Stage(
        name,
        _titled(f"unlearn {training.name}", mark),
        needs=needs,
        after=(settled,) if settled else (),
        inputs=inputs,
        files=tuple(_inside(graph, [training.folder / "delta.safetensors", training.folder / "delta.json"])),
        passing=tuple(_inside(graph, [training.folder / STATES])),
        make=lambda session: train(training, line, graph.key(name), session),
        cost=lambda: training_cost(training, line),
        told=f"unlearn {', '.join(part.value for part in training.parts)} ({training_steps(training, line)} steps)",
    )


def _add_models(graph: RunGraph, line: Lineup, mark: str) -> None:
    """The models that come of the trainings: laid together in memory, and the merged one, which is written."""
    for model in line.models[1:]:
        if model.given is not None and not mark:
            graph.add(_judged_as_it_is(graph, model.name, model.given, line.inputs.base))
        if model.shared:
            continue
        name = mark + model.name
        needs = ("base", *(mark + training.name for training in model.trainings))
        scale = (calibrating(model, mark),) if model.calibration is not None else ()
        if model.folder is not None:
            files = tuple(_inside(graph, [line.folder / "merge.json", model.folder / "**"]))
            graph.add(
                Stage(
                    name,
                    _titled("merge", mark),
                    needs=needs,
                    after=scale,
                    inputs=_made_of(graph, model, mark),
                    files=files,
                    passing=tuple(_inside(graph, [unfinished(model.folder)])),
                    make=lambda session: merge_branches(line, session),
                    cost=lambda: merging_cost(line),
                    told=f"{line.inputs.recipe.merge.rule} of {len(model.trainings)} branches",
                )
            )
        elif name not in graph.stages:
            inputs = _made_of(graph, model, mark)
            graph.add(Stage(name, _titled(model.name, mark), needs=needs, after=scale, inputs=inputs))


def _made_of(graph: RunGraph, model: Model, mark: str) -> Callable[[], Mapping[str, Any]]:
    """What a model's values depend on beside its trainings: how they are merged, or what they would be written in. A scale itself
    enters the key, not what it was calibrated by."""

    def inputs() -> Mapping[str, Any]:
        if model.calibration is not None and not graph.state(calibrating(model, mark)).done:
            raise NotMadeError(f"the scale of {model.name!r} to be calibrated")
        settled = model.settled
        if settled.merge is not None:
            return merged_inputs(settled)
        written = flattened("merge", settled.storage._asdict())
        return written if settled.scale == 1.0 else {**written, "scale": settled.scale}

    return inputs


def calibrating(model: Model, mark: str = "") -> str:
    """The stage that finds a model's scale."""
    return f"{mark}calibrate:{model.name}"


def _add_base_calibration(graph: RunGraph, line: Lineup) -> Calibration | None:
    """What the base has of the metric that models are calibrated by: known before anything is trained."""
    base = _calibration(line, line.models[0], calibration_file(graph.folder, "base"))
    if base is None:
        return None
    if base.subject in [part.value for part in line.inputs.parts.parts]:
        raise RecipeError(f"calibrate.subject: {base.subject!r} is to be forgotten; name what must be kept")
    graph.add(
        Stage(
            "calibrate:base",
            "measure what is to be kept",
            needs=("base",),
            inputs=lambda: calibration_inputs(base),
            files=tuple(_inside(graph, [base.file])),
            passing=tuple(_inside(graph, [base.work])),
            make=lambda session: calibrate_base(base, graph.key("base"), session),
            cost=lambda: calibration_cost(base),
        )
    )
    return base


def _add_calibrations(graph: RunGraph, line: Lineup, mark: str, base: Calibration | None) -> None:
    """The scales of the merged model and of every control."""
    for model in line.models if base is not None else ():
        if model.calibration is not None and base is not None:
            calibration = _calibration(line, model, model.calibration)
            assert calibration is not None
            graph.add(_calibrated(graph, calibration, base, mark))


def _calibrated(graph: RunGraph, calibration: Calibration, base: Calibration, mark: str) -> Stage[Session]:
    name = calibrating(calibration.model, mark)
    return Stage(
        name,
        _titled(f"calibrate {calibration.model.name}", mark),
        needs=("base", "calibrate:base", *(mark + training.name for training in calibration.model.trainings)),
        inputs=lambda: calibration_inputs(calibration),
        files=tuple(_inside(graph, [calibration.file])),
        passing=tuple(_inside(graph, [calibration.work])),
        make=lambda session: calibrate(calibration, base, graph.key(name), session),
        cost=lambda: calibration_cost(calibration),
    )


def _calibration(line: Lineup, model: Model, file: Path) -> Calibration | None:
    settings, items = line.inputs.recipe.calibrate, line.inputs.base.calibration_items
    return None if settings is None or items is None else Calibration(model, line, settings, items, file)


def _add_judgings(graph: RunGraph, line: Lineup, mark: str, base_folder: Path) -> list[Judging]:
    """Every evaluation of every model. The base, and what stands beside it, is judged with the first seed alone."""
    judgings = []
    for model in line.models:
        if model.shared and mark:
            continue
        # What is measured again under an attack is measured without one first.
        for items in sorted(
            line.inputs.base.judged_at(model.name), key=lambda each: measured_again(each.settings) is not None
        ):
            folder = evaluation_folder(line.folder, model.name)
            judging = Judging(model, items, line, folder, base_folder)
            judgings.append(judging)
            graph.add(_judging(graph, judging, mark))
    return judgings


def judging_name(judging: Judging, mark: str = "") -> str:
    """`judge:merged/3f0a12...`: an evaluation may be called anything, its file may not."""
    return f"{mark}judge:{judging.model.name}/{judging.file.stem}"


def _judging(graph: RunGraph, judging: Judging, mark: str) -> Stage[Session]:
    name = judging_name(judging, mark)
    model = judging.model.name if judging.model.shared else mark + judging.model.name
    # The base's texts are there for those who compare with them.
    base = f"judge:base/{judging.file.stem}"
    return Stage(
        name,
        _titled(f"judge {judging.model.name}: {judging.items.name}", mark),
        needs=(model,),
        after=(base,) if base in graph.stages and base != name else (),
        inputs=lambda: judging_inputs(judging),
        files=tuple(_inside(graph, [judging.file])),
        make=lambda session: judge(judging, graph.key(name), graph.key(model), session),
        cost=lambda: judging_cost(judging),
        told=judging.items.name,
    )


def _inside(graph: RunGraph, files: Sequence[Path]) -> list[str]:
    return [file.relative_to(graph.folder).as_posix() for file in files]
