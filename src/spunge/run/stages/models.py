"""The stages of the models that come of trainings, with their scales, and of those that are judged as they are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spunge.merging.earlier import unfinished
from spunge.run.calibrate import Calibration, calibrate, calibrate_base, calibration_inputs
from spunge.run.costs import calibration_cost
from spunge.run.given import Given
from spunge.run.graph import NotMadeError, Stage
from spunge.run.inputs import BaseInputs
from spunge.run.kept import kept_of, refuse_kept
from spunge.run.keys import flattened
from spunge.run.merge import merge_branches, merged_inputs
from spunge.run.models import Lineup, Model, calibration_file
from spunge.run.moments import merged_cost
from spunge.run.session import Session
from spunge.run.stages.moments import made_from
from spunge.run.stages.naming import RunGraph, inside, stage_of, titled


def add_models(graph: RunGraph, line: Lineup, mark: str) -> None:
    """The models that come of the trainings: laid together in memory, and the merged one, which is written."""
    for model in line.models[1:]:
        if model.given is not None and not mark:
            graph.add(_judged_as_it_is(graph, model.name, model.given, line.inputs.base))
        if model.shared:
            continue
        name = stage_of(model, mark)
        needs = ("base", *made_from(model, line, mark))
        scale = (calibrating(model, mark),) if model.calibration is not None else ()
        if model.folder is not None:
            files = tuple(inside(graph, [line.folder / "merge.json", model.folder / "**"]))
            graph.add(
                Stage(
                    name,
                    titled("merge", mark),
                    needs=needs,
                    after=scale,
                    inputs=_made_of(graph, model, mark),
                    files=files,
                    passing=tuple(inside(graph, [unfinished(model.folder)])),
                    make=lambda session: merge_branches(line, session),
                    cost=lambda: merged_cost(line),
                    told=f"{line.inputs.recipe.merge.rule} of {len(model.trainings)} branches",
                )
            )
        elif name not in graph.stages:
            inputs = _made_of(graph, model, mark)
            graph.add(Stage(name, titled(model.name, mark), needs=needs, after=scale, inputs=inputs))


def _judged_as_it_is(graph: RunGraph, name: str, given: Given, base: BaseInputs) -> Stage[Session]:
    """A model that is judged and that nothing is made of."""

    def inputs() -> Mapping[str, Any]:
        if not given.here:
            raise NotMadeError(f"{given.path!r} to be downloaded")
        key = {"model": given.key(base)}
        return key if given.whole else {**key, "base": graph.key("base")}

    return Stage(name, given.path, inputs=inputs)


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


def add_base_calibration(graph: RunGraph, line: Lineup) -> Calibration | None:
    """What the base has of the metric that models are calibrated by: known before anything is trained."""
    base = _calibration(line, line.models[0], calibration_file(graph.folder, "base"))
    if base is None:
        return None
    refuse_kept(line.inputs.base, line.inputs.parts.values)
    graph.add(
        Stage(
            "calibrate:base",
            "measure what is to be kept",
            needs=("base",),
            inputs=lambda: calibration_inputs(base),
            files=tuple(inside(graph, [base.file])),
            passing=tuple(inside(graph, [base.work])),
            make=lambda session: calibrate_base(base, graph.key("base"), session),
            cost=lambda: calibration_cost(base),
        )
    )
    return base


def add_calibrations(graph: RunGraph, line: Lineup, mark: str, base: Calibration | None) -> None:
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
        titled(f"calibrate {calibration.model.name}", mark),
        needs=("base", "calibrate:base", *made_from(calibration.model, calibration.lineup, mark)),
        inputs=lambda: calibration_inputs(calibration),
        files=tuple(inside(graph, [calibration.file])),
        passing=tuple(inside(graph, [calibration.work])),
        make=lambda session: calibrate(calibration, base, graph.key(name), session),
        cost=lambda: calibration_cost(calibration),
    )


def _calibration(line: Lineup, model: Model, file: Path) -> Calibration | None:
    settings, kept = line.inputs.recipe.calibrate, kept_of(line.inputs.base)
    return None if settings is None or kept is None else Calibration(model, line, settings, kept, file)
