"""What trainings are measured by on their way, and which of their steps is kept (`watch`).

A step is chosen on half of an evaluation's items; the other half alone is judged, so that no model is judged by what chose it.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spunge.data.items import Items
from spunge.data.some import at_most, some_of
from spunge.errors import RecipeError, suggestion
from spunge.evaluation.evaluator import Measure
from spunge.evaluation.statistics import score
from spunge.files import fingerprint, read_json
from spunge.model.loading import Base
from spunge.progress import SILENT
from spunge.registry import EVALUATORS
from spunge.results import Wanted, json_value, merit, real, wanted
from spunge.run.calibrate import kept_share
from spunge.run.groups import way_of, what_is
from spunge.run.inputs import SeedInputs
from spunge.run.judge import bench_of, evaluation_inputs, measured_by
from spunge.run.keys import flattened
from spunge.run.models import Lineup, Training
from spunge.run.named import metrics_of, unmeasured
from spunge.run.session import Session
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.watching import Reading, Readings, Watch, Watched

VERSION = 1  # rises when the same settings may keep another step
# For what says which items are measured stands what they are.
OF_ITEMS: dict[str, Any] = {"evaluation": True, "subject": True, "limit": True, "beside": {"evaluation", "subject"}}
FOLDER = "watch"  # of what evaluations write while a model trains


@dataclass(frozen=True)
class Curve:
    """A metric that a training is measured by on its way."""

    block: str  # watch or watch.beside
    metric: str
    subject: str
    items: Items  # those that are measured, of all the training's curves of this evaluation
    members: np.ndarray  # the curve's among them
    forget: bool | None  # whether its items are to be forgotten; None: some of either
    decides: bool  # whether a step is chosen by it

    def wanted(self, measure: Measure) -> Wanted | None:
        """Which way is good."""
        return way_of(measure, self.forget)


@dataclass(frozen=True)
class Choice:
    """What a curve is of: some of an evaluation's items."""

    block: str
    metric: str
    subject: str
    whole: Items
    own: np.ndarray
    forget: bool | None


def curves_of(training: Training, inputs: SeedInputs) -> tuple[Curve, ...]:
    """The curves of a training, that of the recipe's metric first; none where it is not watched. Raises RecipeError where an
    evaluation has no such subject."""
    watch = inputs.recipe.watch
    if watch is None:
        return ()
    asked: dict[str, tuple[str, str, str | None]] = {"watch": (watch.evaluation, watch.metric, watch.subject)}
    if watch.beside is not None:
        asked["watch.beside"] = (watch.beside.evaluation, watch.beside.metric, watch.beside.subject)
    choices = [_choice(block, *each, training, inputs) for block, each in asked.items()]
    decides = {"watch": watch.chooses, "watch.beside": watch.share is not None}
    curves = []
    for choice in choices:
        together = [other.own for other in choices if other.whole.name == choice.whole.name]
        rows = np.unique(np.concatenate(together))
        members = np.searchsorted(rows, choice.own)
        items = some_of(choice.whole, rows)
        about = choice.block, choice.metric, choice.subject, items, members, choice.forget
        curves.append(Curve(*about, decides=decides[choice.block]))
    return tuple(curves)


def _choice(
    block: str, evaluation: str, metric: str, subject: str | None, training: Training, inputs: SeedInputs
) -> Choice:
    watch = inputs.recipe.watch
    assert watch is not None
    items = inputs.base.watched_items(evaluation)
    # Without a split the one part holds every row, and is no value of an attribute.
    parts = [part.value for part in inputs.parts.parts] if inputs.parts.attribute is not None else []
    own = [part.value for part in training.parts if part.value in parts] or parts
    there = [value for value in own if value in items.subjects]
    if subject is None and block == "watch" and items.subjects.keys() & set(parts):
        if missing := [value for value in own if value not in there]:
            raise RecipeError(f"watch.subject: {items.name!r} has no items of the part {missing[0]!r}; name a subject")
        rows = np.unique(np.concatenate([at_most(items, items.subjects[value], watch.limit) for value in there]))
        return Choice(block, metric, there[0] if len(there) == 1 else "all parts", items, rows, True)
    named = _named(block, subject, items)
    _, forget = what_is(named, items.subjects, items, items.settings, parts)
    if block != "watch" and forget is not False:
        raise RecipeError(f"{block}.subject: {named!r} is to be forgotten, all or in part; name what must be kept")
    return Choice(block, metric, named, items, at_most(items, items.subjects[named], watch.limit), forget)


def _named(block: str, subject: str | None, items: Items) -> str:
    """The subject that a block names, or means."""
    if subject is None and (items.overall is not None or len(items.subjects) == 1):
        return items.overall or next(iter(items.subjects))
    if subject is None:
        raise RecipeError(
            f"{block}.subject: missing, and {items.name!r} has several: {', '.join(items.subjects)}; name one"
        )
    if subject not in items.subjects:
        raise RecipeError(f"{block}.subject: {items.name!r} has no {subject!r}{suggestion(subject, items.subjects)}")
    return subject


def refuse_watch(inputs: SeedInputs, trainings: Sequence[Training]) -> list[Items]:
    """Raises RecipeError for a subject, a metric or a way that there is not, before anything is trained. Returns the items."""
    watched = []
    for training in trainings:
        for curve in curves_of(training, inputs):
            if why := unmeasured(curve.metric, curve.items):
                raise RecipeError(f"{curve.block}.metric: the evaluation {curve.items.name!r} {why}")
            higher = (metrics_of(curve.items) or {}).get(curve.metric)
            if curve.decides and higher is not None:  # else only measuring tells which way is good
                _refuse_wayless(curve, wanted(higher, curve.forget))
            watched.append(curve.items)
    return watched


def _refuse_wayless(curve: Curve, way: Wanted | None) -> None:
    """Raises RecipeError for a metric that no way is good of, and beside for one of which no share can be kept."""
    if way == "near" and curve.block != "watch":
        raise RecipeError(
            f"{curve.block}.metric: {curve.metric!r} should be near a value, and no share of it can be kept; name another metric"
        )
    if way is None:
        raise RecipeError(
            f"{curve.block}.metric: which way {curve.metric!r} is good on {curve.subject!r} is not known, and keep: best needs to; "
            "name another subject or metric, or give the evaluation's group"
        )


def watching_inputs(training: Training, inputs: SeedInputs) -> dict[str, Any]:
    """What a training's delta depends on where its best step is kept; where it is only watched, nothing."""
    watch = inputs.recipe.watch
    if watch is None or not watch.chooses:
        return {}
    return {
        **flattened("watch", watch.model_dump(mode="json", exclude=OF_ITEMS)),
        "watch's version": VERSION,
        "watched items": _measured_by(training, inputs),
    }


def _measured_by(training: Training, inputs: SeedInputs) -> str:
    """Fingerprint of what a training is measured by, each time, and of what says which way is good."""
    told = [
        [curve.metric, curve.subject, curve.members.tolist(), curve.forget, evaluation_inputs(curve.items, inputs.base)]
        for curve in curves_of(training, inputs)
    ]
    return fingerprint(told)


def steps_between(training: Training, inputs: SeedInputs) -> int:
    """Steps between two measurements of a training."""
    watch, unlearn = inputs.recipe.watch, inputs.unlearn
    assert watch is not None
    if isinstance(watch.every, int):
        return watch.every
    assert isinstance(unlearn, TrainingSettings)
    assert watch.epochs is not None
    once = unlearn.model_copy(update={"steps": None, "epochs": 1.0})
    return max(1, round(watch.epochs * sum(once.steps_for(len(part.samples)) for part in training.parts)))


def watch_of(training: Training, line: Lineup, key: str, session: Session) -> Watch | None:
    """The watch of a training; None where the recipe asks for none."""
    inputs, settings = line.inputs, line.inputs.recipe.watch
    if settings is None:
        return None
    curves, every = curves_of(training, inputs), steps_between(training, inputs)

    def measure(base: Base, step: int) -> Readings:
        measures = _measures(curves, training, line, fingerprint([key, step]), session, base)
        readings = tuple(_reading(curve, each) for curve, each in zip(curves, measures, strict=True))
        if step == 0 and settings.chooses:
            _refuse_start(curves, measures, readings)
        return readings

    def rank(readings: Readings, before: Readings) -> tuple[float, float]:
        return ranked(readings, _of_base(training, before), settings.share)

    return Watch(
        every=every,
        names=[f"{curve.metric} on {curve.subject}" for curve in curves],
        measure=measure,
        key=fingerprint([_measured_by(training, inputs), every]),
        rank=rank if settings.chooses else None,
    )


def _of_base(training: Training, before: Readings) -> Readings:
    """The readings of the base: before the first step, of the first training of a row."""
    if not training.earlier:
        return before
    told = read_json(training.earlier[0].folder / "delta.json")["watched"]["curves"]
    starts = [(curve["points"][0], curve["wanted"]) for curve in told]
    return tuple(Reading(real(point["value"]), math.nan, math.nan, way) for point, way in starts)


def ranked(readings: Readings, base: Readings, share: float | None) -> tuple[float, float]:
    """How good a step is, the greater the better: of those that keep enough the best by the metric, before all others; of the
    others the one that keeps most. share: of the metric beside, that is to be kept; None: nothing is."""
    value, way = readings[0].value, readings[0].wanted
    better = -math.inf if math.isnan(value) or way is None else merit(value, way, readings[0].target)
    if share is None:
        return 1.0, better
    kept = share_kept(readings, base)
    return (1.0, better) if kept >= share else (0.0, kept)


def share_kept(readings: Readings, base: Readings) -> float:
    """The share of the base's that is kept of the metric beside, which is known to be good up or down."""
    way = readings[1].wanted
    return kept_share(readings[1].value, base[1].value, way) if way in ("up", "down") else math.nan


def _measures(
    curves: Sequence[Curve], training: Training, line: Lineup, model: str, session: Session, base: Base
) -> list[Measure]:
    """The measure of each curve, of the model in memory; each evaluation is asked once. What it writes is of no use after."""
    folder = watching_folder(training, line)
    # The steps that are told are the training's.
    bench = replace(bench_of(line, training.name, model, folder, folder, session), progress=SILENT.step)
    measures: dict[str, list[Measure]] = {}
    for curve in curves:
        items = curve.items
        if items.name not in measures:
            measures[items.name] = EVALUATORS.get(items.settings.kind).measure(base, items.settings, items.table, bench)
    shutil.rmtree(folder, ignore_errors=True)
    return [measured_by(measures[curve.items.name], curve.metric, curve.items, curve.block) for curve in curves]


def watching_folder(training: Training, line: Lineup) -> Path:
    """Of what evaluations write while a model trains."""
    return line.folder / FOLDER / training.name.replace(":", "-").replace("/", "-")


def _reading(curve: Curve, measure: Measure) -> Reading:
    found = score([measure], curve.members)
    return Reading(found.value, found.low, found.high, curve.wanted(measure), measure.target)


def _refuse_start(curves: Sequence[Curve], measures: Sequence[Measure], readings: Readings) -> None:
    """Raises RecipeError before the first step for what no step can be chosen by."""
    for curve, measure, reading in zip(curves, measures, readings, strict=True):
        if not curve.decides:
            continue
        _refuse_wayless(curve, curve.wanted(measure))
        shared = curve.block != "watch"
        if math.isnan(reading.value) or (shared and not 0 < reading.value < math.inf):
            raise RecipeError(
                f"{curve.block}.metric: {curve.metric!r} on {curve.subject!r} is {reading.value:g} before the first step, and no "
                "step can be chosen by it; name another metric"
            )


def described(training: Training, inputs: SeedInputs, watched: Watched) -> dict[str, Any]:
    """What became of a watch, for delta.json."""
    settings = inputs.recipe.watch
    assert settings is not None
    content = {
        "every": steps_between(training, inputs),
        "keep": settings.keep,
        "kept": watched.kept,
        "trained": watched.trained,
        "seconds": round(watched.seconds, 2),
        "curves": [_drawn(curve, place, watched) for place, curve in enumerate(curves_of(training, inputs))],
    }
    if settings.share is None:
        return content
    [kept] = [point.readings for point in watched.points if point.step == watched.kept]
    share = share_kept(kept, _of_base(training, watched.points[0].readings))
    return {**content, "asked": settings.share, "share": json_value(share), "reached": share >= settings.share}


def _about(curve: Curve) -> dict[str, Any]:
    """What a curve is of, for delta.json."""
    return {
        "evaluation": curve.items.name,
        "metric": curve.metric,
        "subject": curve.subject,
        "beside": curve.block != "watch",
        "rows": curve.items.sha256[:12],
        "n": len(curve.members),
    }


def _drawn(curve: Curve, place: int, watched: Watched) -> dict[str, Any]:
    readings = [(point.step, point.readings[place]) for point in watched.points]
    return {
        **_about(curve),
        "wanted": readings[0][1].wanted,
        "target": readings[0][1].target,
        "points": [
            {"step": step, **json_value({"value": reading.value, "low": reading.low, "high": reading.high})}
            for step, reading in readings
        ],
    }


def measured_otherwise(training: Training, inputs: SeedInputs, watched: Mapping[str, Any]) -> bool:
    """Whether the curves of a finished training are of something else than the recipe asks now."""
    asked = [_about(curve) for curve in curves_of(training, inputs)]
    told = [{name: curve[name] for name in asked[0]} for curve in watched["curves"]]
    return told != asked or watched["every"] != steps_between(training, inputs)


def told_of(watched: Mapping[str, Any] | None) -> list[str]:
    """Which step is kept, and whether it keeps enough, for the person who watches."""
    if watched is None or watched["keep"] == "last":
        return []
    told = f"the best of {watched['trained']}"
    if watched.get("reached", True):
        return [told]
    share = float(real(watched["share"]))
    return [
        f"no step keeps {watched['asked']:.1%} of {watched['curves'][1]['metric']}; this one keeps most, {share:.1%}"
    ]
