"""The stages that calibrate: each model that unlearned gets the largest scale at which a metric keeps its share of the base's.

Arms that forget are then compared at equal cost, as Unlearning with Control asks (Wang et al. 2024, arXiv 2406.09179). The
metric is measured on half of an evaluation's items; the other half alone is judged. The scale is found by bisection; each try is
the model as it would be written at that scale, laid over the base in memory. What has to be merged for it is merged once.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spunge.data.items import Items
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Measure
from spunge.files import fingerprint, free_space, read_json, sealed, unsealed, write_json
from spunge.merging.values import merged_changes
from spunge.progress import SILENT
from spunge.recipe.calibration import Calibrate
from spunge.registry import EVALUATORS, RULES
from spunge.results import json_value, real
from spunge.run.graph import Made
from spunge.run.judge import bench_of, evaluation_inputs
from spunge.run.kept import Figure, Kept, figure_of
from spunge.run.keys import flattened
from spunge.run.merge import merged_inputs
from spunge.run.models import Lineup, Model, Training, delta_sources
from spunge.run.session import Session
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import write_delta
from spunge.weights.rounding import Storage

VERSION = 2  # rises when the same settings may give another scale
TRIED = "tried.json"  # of a calibration that is under way
MERGED = "merged"  # its deltas merged at scale 1, in float32
HELD = 4 << 30  # bytes of that; a larger merge, or one that the disk has no room for, is made again for each try


@dataclass(frozen=True)
class Calibration:
    """The calibration of one model, or of the base, which the others are held against."""

    model: Model
    lineup: Lineup
    settings: Calibrate
    kept: Kept
    file: Path

    @property
    def work(self) -> Path:
        """Of what is kept until it is done."""
        return self.file.with_suffix("")


class Point(NamedTuple):
    """Where a bisection ended."""

    scale: float
    share: float  # of the base's, that is kept there
    bound: Literal["low", "high"] | None  # None: the point was reached


def calibration_inputs(calibration: Calibration) -> dict[str, Any]:
    """What a calibration depends on beside the models."""
    settings, kept, model = calibration.settings, calibration.kept, calibration.model
    base = calibration.lineup.inputs.base
    measured = [evaluation_inputs(items, base) for items in kept.items]
    about: dict[str, Any]
    if kept.mean is not None:
        about = {"calibrate.aggregate": kept.mean.model_dump(mode="json")}
        about |= {f"of {items.name}": each for items, each in zip(kept.items, measured, strict=True)}
    else:
        about = {
            **flattened("calibrate", settings.model_dump(mode="json", include={"metric", "subject"})),
            **measured[0],
        }
        if len(kept.items[0].subjects) > 1:  # also the one that is meant where none is named
            about["calibrate.subject"] = kept.subject
    content: dict[str, Any] = {**about, "calibration's version": VERSION}
    content |= {f"items of {name}": fingerprint(own) for name, own in kept.members.items()}
    if (dtype := base.judged.dtype) != base.recipe.model.dtype:
        content["arithmetic"] = dtype
    if model.name == "base":
        return content
    names = {"keep", "max_scale", "tries", "tolerance"}
    content |= flattened("calibrate", settings.model_dump(mode="json", include=names))
    made = merged_inputs(model) if model.merge is not None else flattened("merge", model.storage._asdict())
    return {**content, **{name: value for name, value in made.items() if name != "merge.scale"}}


def calibrate_base(calibration: Calibration, model_key: str, session: Session) -> Made:
    """Measure the base. Raises RecipeError for a metric that is not measured, or of which no share can be kept."""
    kept = calibration.kept
    value, way = _figure(calibration, session, calibration.model, model_key)
    if way is None or not math.isfinite(value) or value <= 0:
        why = "which way is good is not known of it" if way is None else f"the base has {value:g}"
        setting = "metric" if kept.mean is None else "aggregate"
        raise RecipeError(f"calibrate.{setting}: {kept.metric!r} on {kept.subject!r}: {why}; name another {setting}")
    write_json(calibration.file, {"value": value, "wanted": way, "n": kept.n})
    return Made([calibration.file], f"{kept.metric} {value:.4g} on {kept.subject}")


def calibrate(calibration: Calibration, base: Calibration, key: str, session: Session) -> Made:
    """Find a model's scale."""
    settings, against = calibration.settings, read_json(base.file)
    tried = _earlier(calibration, key)

    scaled = cache(partial(_scaled, calibration))

    def share(scale: float) -> float:
        if repr(scale) not in tried:
            model = scaled()(scale)
            tried[repr(scale)] = _figure(calibration, session, model, fingerprint([key, scale])).value
            write_json(calibration.work / TRIED, sealed({"key": key, "tried": json_value(tried)}))
            session.watcher.step(len(tried), settings.tries, f"scale {scale:.4g}")
        value = tried[repr(scale)]
        return kept_share(value, against["value"], against["wanted"])

    point = bisected(share, settings)
    content = {
        "evaluation": calibration.kept.name,
        "metric": calibration.kept.metric,
        "subject": calibration.kept.subject,
        "keep": settings.keep,
        "scale": point.scale,
        "reached": point.bound is None,
        "bound": point.bound,
        "value": json_value(tried[repr(point.scale)]),
        "base": against["value"],
        "share": json_value(point.share),
        "rows": calibration.kept.rows,
        "n": against["n"],
        "tried": json_value(tried),
    }
    write_json(calibration.file, content)
    return Made([calibration.file], told(point, settings))


def _scaled(calibration: Calibration) -> Callable[[float], Model]:
    """The model at any scale. Every rule of ours multiplies by its scale at last, so that one merge serves all of them."""
    model, base = calibration.model, calibration.lineup.inputs.base.folder
    merge = model.merge
    if merge is None or merge.rule not in RULES.builtin:
        return model.scaled
    sources = delta_sources(model.trainings)
    plain = Checkpoint(base)
    names = {name for source in sources for name in source.names}
    folder = calibration.work / MERGED
    shutil.rmtree(folder, ignore_errors=True)
    if 4 * sum(math.prod(plain.tensors[name].shape) for name in names) > min(HELD, free_space(folder)):
        return model.scaled
    changes = dict(merged_changes(base, sources, merge.model_copy(update={"scale": 1.0})))
    if not any(bool(change.any()) for change in changes.values()):
        return model.scaled
    write_delta(folder, changes, {"base": plain.fingerprint()}, "merge")
    once = Training(MERGED, folder, ())
    storage = Storage(merge.dtype, merge.rounding)
    return lambda scale: replace(
        model, trainings=(once,), merge=None, folder=None, calibration=None, storage=storage, scale=scale
    )


def told(point: Point, settings: Calibrate) -> str:
    """The scale, and whether it reached the point, in a line."""
    kept = f"scale {point.scale:.4g} keeps {point.share:.1%}"
    if point.bound is None:
        return kept
    which = "the largest" if point.bound == "high" else "the smallest that was tried"
    than = "more" if point.bound == "high" else "less"
    return f"{kept}, {than} than {settings.keep:.1%}: the point is not reached, and it is judged at {which}"


def kept_share(value: float, base: float, way: Literal["up", "down"]) -> float:
    """Which share of the base's is kept: of what should stay high value / base, else base / value.

    >>> kept_share(0.38, 0.4, "up"), kept_share(20.0, 16.0, "down"), kept_share(math.nan, 1.0, "up")
    (0.95, 0.8, 0.0)
    """
    if math.isnan(value):
        return 0.0
    if way == "up":
        return value / base
    return base / value if value else math.inf


def bisected(share: Callable[[float], float], settings: Calibrate) -> Point:
    """The largest scale up to `max_scale` that keeps enough, as far as so many tries tell. The share is taken to fall with it."""
    low, high = 0.0, settings.max_scale
    if (there := share(high)) >= settings.keep:
        return Point(high, there, "high")
    best = lowest = Point(high, there, "low")
    for _ in range(settings.tries - 1):
        if best.bound is None and best.share <= settings.keep + settings.tolerance:
            break
        scale = (low + high) / 2
        if (there := share(scale)) >= settings.keep:
            low, best = scale, Point(scale, there, None)
        else:
            high, lowest = scale, Point(scale, there, "low")
    return best if best.bound is None else lowest


def _figure(calibration: Calibration, session: Session, model: Model, key: str) -> Figure:
    """What is to be kept, of a model."""
    bench: Bench = bench_of(calibration.lineup, model.name, key, calibration.work, calibration.work, session)
    base = session.show(None if model.name == "base" else model)

    def measured(items: Items) -> Sequence[Measure]:
        evaluator = EVALUATORS.get(items.settings.kind)
        # The steps that are told are tries, not items.
        return evaluator.measure(base, items.settings, items.table, replace(bench, progress=SILENT.step))

    return figure_of(calibration.kept, measured)


def _earlier(calibration: Calibration, key: str) -> dict[str, float]:
    """What an earlier process tried of this very calibration."""
    stored: Mapping[str, Any] = unsealed(read_json(calibration.work / TRIED)) or {}
    return {scale: real(value) for scale, value in stored["tried"].items()} if stored.get("key") == key else {}
