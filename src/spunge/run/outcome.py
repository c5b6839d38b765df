"""The last stages: results.json from every measurement, and the page that shows it."""

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spunge import __version__
from spunge.data.items import Items
from spunge.evaluation.evaluator import Measure
from spunge.files import read_json, write_json
from spunge.recipe.decoding import Decode, DExperts, GeDi, Offset, shift_of
from spunge.recipe.schema import Recipe
from spunge.report.page import write_page
from spunge.results import (
    SUBJECTS,
    UNTAUGHT,
    Calibration,
    Decoding,
    Model,
    Part,
    Point,
    Published,
    Results,
    Watched,
    real,
    write_results,
)
from spunge.run.by_metric import Judged
from spunge.run.graph import Graph, Made
from spunge.run.inputs import SeedInputs
from spunge.run.judge import Judging
from spunge.run.kept import kept_of
from spunge.run.measured import read_measured
from spunge.run.models import Lineup
from spunge.run.models import Model as Judgeable
from spunge.run.named import unmatched_rows
from spunge.run.scoring import scored
from spunge.run.session import Session, Used
from spunge.run.stamps import read_stamp
from spunge.run.train import choice
from spunge.weights.checkpoint import Checkpoint

NAMES = [each.name for each in fields(Calibration)]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "duckdb", "safetensors", "numpy")


def write_scores(
    recipe: Recipe,
    graph: Graph[Session],
    seeds: Sequence[Lineup],
    judgings: Sequence[Sequence[Judging]],
    used: Used,
) -> Made:
    """Write results.json. `seeds`: what was trained and judged for each seed; `judgings`: each seed's evaluations."""
    first = seeds[0].inputs
    models = tuple(described(each, seeds) for each in seeds[0].models)
    values = [part.value for part in first.parts.parts if part.value in first.parts.values]
    every = [judging for of_seed in judgings for judging in of_seed]
    measured = [(judging, read_measured(judging.file)) for judging in every]
    evaluations = [
        Judged(
            items,
            first.base.instruments[items.name],
            [rated for judging, each in measured if judging.items.name == items.name for rated in each.rated],
        )
        for items in first.base.evaluations
    ]
    scores = scored(evaluations, models, [stored_measures(of_seed) for of_seed in judgings], values, recipe.aggregates)
    # Where everything was made before, the training says where; where nothing is trained, what was measured first.
    trainings = seeds[0].trainings
    where = read_json(trainings[0].folder / "delta.json") if trainings else measured[0][1]._asdict() if measured else {}
    results = Results(
        spunge=__version__,
        attribute=first.parts.attribute,
        parts=tuple(Part(value=part.value, slug=part.slug) for part in first.parts.parts),
        stages=tuple(model.stage for model in models),
        models=models,
        versions=versions(),
        device=used.device or where.get("device"),
        dtype=used.dtype or where.get("dtype"),
        seconds=_seconds(graph),
        peak_memory=used.peak_memory,
        rows=scores.rows,
        differences=scores.differences,
        recovered=scores.recovered,
        evaluations=scores.evaluations,
        watched=tuple(curves(seeds)),
        published=tuple(Published(**entry.model_dump()) for entry in recipe.published),
        seeds=len(seeds),
        folder=graph.folder,
    )
    write_results(results)
    write_json(graph.folder / SUBJECTS, _subjects(first.base.evaluations))
    lost = unmatched_rows(recipe.published, scores.rows)
    return Made([graph.folder / "results.json", graph.folder / SUBJECTS], f"{len(scores.rows)} scores{lost}")


def _subjects(evaluations: Sequence[Items]) -> dict[str, dict[str, list[int]]]:
    """Evaluation -> subject -> its items, so that what a model wrote is told from what it wrote about another."""
    return {
        items.name: {subject: members.tolist() for subject, members in items.subjects.items()} for items in evaluations
    }


def described(model: Judgeable, seeds: Sequence[Lineup]) -> Model:
    """What a model is and what made it. `model`: the first seed's."""
    inputs = seeds[0].inputs
    plain = Model(stage=model.name, kind=model.kind, name=model.label)
    named = inputs.recipe.model if model.given is None else model.given
    plain = replace(plain, base=named.path, revision=named.revision)
    decode = inputs.recipe.decode
    if decode is not None and model.given is not None and not model.given.whole:
        plain = replace(plain, decode=_decoding(decode, inputs, model))
    if model.shared and model.kind != "base":  # not made from the base
        retrained = inputs.reference if model.kind == "reference" and model.name != UNTAUGHT else None
        return plain if retrained is None else replace(plain, taught=len(retrained.samples))
    lesson = inputs.base.lesson
    if decode is not None and model.name == "base":
        weights = Checkpoint(inputs.base.large).fingerprint()
        return replace(plain, base=decode.path, revision=decode.revision, base_fingerprint=weights)
    plain = replace(plain, base_fingerprint=inputs.base.weights, taught=None if lesson is None else len(lesson.samples))
    if model.shared:
        return plain
    unlearn = next(iter(model.trainings)).settings(choice(seeds[0]).settings)
    controls = {control.name: control.train for control in inputs.recipe.controls}
    made = model.settled
    unmerged = {} if model.calibration is None else {"scale": made.scale}
    merge: dict[str, Any] = unmerged if made.merge is None else made.merge.model_dump(mode="json", exclude={"rule"})
    numbers = {name: merge.pop(name) for name in ("density", "scale") if isinstance(merge.get(name), int | float)}
    return replace(
        plain,
        train=controls[model.label] if model.kind == "control" else "parts",
        parts=tuple(part.value for training in model.trainings for part in training.parts),
        method=unlearn.method,
        settings=unlearn.model_dump(mode="json", exclude={"method"}),
        rule=None if model.merge is None or model.apart else model.merge.rule,
        **({} if model.apart else numbers),
        merge=None if model.merge is None or model.apart else merge,
        decode=None if decode is None else _decoding(decode, inputs, model),
        calibration=_calibrations(model, seeds),
        seeds=tuple(line.inputs.recipe.seed for line in seeds),
    )


def _decoding(decode: Decode, inputs: SeedInputs, model: Judgeable) -> Decoding:
    shift = shift_of(decode, inputs.recipe.unlearn, model.shifting)
    experts = decode if isinstance(decode, DExperts) else None
    classes = decode if isinstance(decode, GeDi) else None
    return Decoding(
        kind=decode.kind,
        model=decode.path,
        revision=decode.revision,
        alpha=decode.alpha,
        merge=decode.merge if model.apart and decode.merge != "weights" else None,
        density=shift.get("density"),
        top_p=experts.top_p if experts else None,
        expert=experts.expert if experts else None,
        through=decode.through if isinstance(decode, Offset) else None,
        rho=classes.rho if classes else None,
        tau=classes.tau if classes else None,
    )


def _calibrations(model: Judgeable, seeds: Sequence[Lineup]) -> tuple[Calibration, ...] | None:
    """How a model's scale was set, at each seed."""
    if model.calibration is None:
        return None
    files = [each.calibration for line in seeds for each in line.models if each.name == model.name and each.calibration]
    kept = kept_of(seeds[0].inputs.base)
    # An evaluation or aggregate that has another name now is the same one.
    names = {} if kept is None else {"evaluation": kept.name, "metric": kept.metric}
    return tuple(Calibration(**{name: real(read_json(file)[name]) for name in NAMES} | names) for file in files)


def curves(seeds: Sequence[Lineup]) -> Iterator[Watched]:
    """What the trainings were measured by on their way, as far as they were watched when they were made."""
    for line in seeds:
        for training in line.trainings if line.inputs.recipe.watch is not None else ():
            told = read_json(training.folder / "delta.json").get("watched")
            for curve in told["curves"] if told else ():
                about = {name: value for name, value in told.items() if name != "curves"} | curve
                points = tuple(
                    Point(step=point["step"], value=real(point["value"]), **_interval(point))
                    for point in curve["points"]
                )
                share = {"share": real(told["share"])} if "share" in told else {}
                yield Watched(
                    **{**about, **share, "points": points},
                    training=training.name,
                    name=training.parts[0].value
                    if training.name.startswith("branch:")
                    else training.name.partition(":")[2],
                    seed=line.inputs.recipe.seed,
                )


def _interval(point: Mapping[str, Any]) -> dict[str, float]:
    """Without ends that could not be had."""
    return {name: real(point[name]) for name in ("low", "high") if not math.isnan(real(point[name]))}


def write_report(folder: Path) -> Made:
    """Write report.html."""
    return Made([write_page(folder)])


def stored_measures(judgings: Sequence[Judging]) -> dict[str, dict[str, list[Measure]]]:
    """Model -> evaluation -> its measurements, of one seed."""
    by_model: dict[str, dict[str, list[Measure]]] = {}
    for judging in judgings:
        by_model.setdefault(judging.model.name, {})[judging.items.name] = read_measured(judging.file).measures
    return by_model


def _seconds(graph: Graph[Session]) -> float:
    """What all stages took that were made here, whenever."""
    stamps = [read_stamp(graph.folder, name) for name in graph.stages if name not in ("results", "page")]
    return round(sum(stamp.seconds for stamp in stamps if stamp), 1)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    installed = {"python": platform.python_version(), "spunge": __version__}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
