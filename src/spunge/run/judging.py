"""Every stage's model is judged by every evaluation.

What is kept are the items' measurements (RUN/evaluation/STAGE/), so that statistics are made anew without judging again.
The base's are kept across runs too, in the folder that SPUNGE_CACHE names (by default spunge in the user's cache folder).
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spunge.data.items import Items
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Finetune, Judges, Measure
from spunge.files import cache_folder, read_json, write_json
from spunge.model.loading import Base
from spunge.progress import Watcher
from spunge.registry import EVALUATORS
from spunge.results import Model
from spunge.run.jobs import Job, Run
from spunge.run.scoring import Judged, Scored, scored
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.overlay import applied, overlaid, swapped

KEPT_TEXTS = ("texts-*.jsonl", "scored-*.jsonl")


def judge(work: Run, stage: str, base: Base, judges: Judges, finetune: Finetune, watcher: Watcher) -> None:
    """Run a stage's evaluations that are not done yet. `base` holds the base; the stage's model is put over it."""
    folder = work.evaluation_folder(stage)
    todo = [items for items in work.unscored(stage) if stage != "base" or not _from_cache(work, items, folder)]
    if not todo:
        return
    bench = Bench(
        stage=stage,
        model=work.model_key(stage),
        folder=folder,
        base_folder=work.evaluation_folder("base"),
        judges=judges,
        forget={part.value: part.samples for part in work.parts.parts},
        retain=work.retain,
        settings_of={items.name: items.settings for items in work.evaluations},
        finetune=finetune,
        progress=watcher.step,
    )
    with state(work, stage, base):
        for items in todo:
            watcher.begin(f"judge {stage}: {items.name}")
            started, now = time.perf_counter(), time.time()
            found = EVALUATORS.get(items.settings.kind).measure(base, items.settings, items.table, bench)
            content = {
                "fingerprint": work.scores_key(stage, items),
                "stage": stage,
                "evaluation": items.name,
                "seconds": round(time.perf_counter() - started, 2),
                "measures": [measure_to_json(measure) for measure in found],
            }
            write_json(work.scores_file(stage, items), content)
            if stage == "base":
                _to_cache(content, [file for file in _texts(folder) if file.stat().st_mtime >= now - 1])
            watcher.end(f"{items.table.num_rows} items" if items.table.num_rows else f"{len(found)} measures")


@contextmanager
def state(work: Run, stage: str, base: Base) -> Iterator[None]:
    """Inside the block, the model in memory is the stage's: the base with its deltas, or the very tensors in RUN/merged."""
    with ExitStack() as layers:
        for layer in _layers(work, stage, base):
            layers.enter_context(layer)
        yield


def _layers(work: Run, stage: str, base: Base) -> Iterator[AbstractContextManager[None]]:
    model = work.models[stage]
    if stage == "merged":
        changed = list((read_json(work.folder / "merge.json") or {})["tensors"])
        yield swapped(base.parameters, Checkpoint(work.folder / "merged"), changed)
    elif model.merge is None:
        for job in model.jobs:
            yield applied(base.parameters, open_delta(job.folder))
    else:
        from spunge.merging.engine import merged_changes

        sources = delta_sources(model.jobs)
        names = dict.fromkeys(name for source in sources for name in source.names)
        yield overlaid(base.parameters, names, merged_changes(work.base_folder, sources, model.merge))


@contextmanager
def starting(job: Job, base: Base) -> Iterator[None]:
    """Inside the block, the model in memory is the one that a job's training starts from."""
    with ExitStack() as layers:
        for earlier in reversed(list(_before(job))):
            layers.enter_context(applied(base.parameters, open_delta(earlier.folder)))
        yield


def _before(job: Job) -> Iterator[Job]:
    while job.after is not None:
        job = job.after
        yield job


def delta_sources(jobs: Sequence[Job]) -> list[Any]:
    """The jobs' deltas, to be merged."""
    from spunge.weights.sources import DeltaSource

    return [DeltaSource(open_delta(job.folder), job.parts[0].value) for job in jobs]


def _cached(key: str) -> Path:
    return cache_folder() / "base" / key[:32]


def _from_cache(work: Run, items: Items, folder: Path) -> bool:
    """Take the base's scores, and the texts that were made for them, from an earlier run."""
    place = _cached(work.scores_key("base", items))
    content = read_json(place / "scores.json")
    if not isinstance(content, dict) or content.get("fingerprint") != work.scores_key("base", items):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for file in _texts(place):
        shutil.copyfile(file, folder / file.name)
    write_json(work.scores_file("base", items), {**content, "evaluation": items.name})
    return True


def _to_cache(content: Mapping[str, Any], texts: Sequence[Path]) -> None:
    """Keep the base's scores for other runs; a folder that cannot be written is none's loss."""
    place = _cached(str(content["fingerprint"]))
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in texts:
            shutil.copyfile(file, place / file.name)
        write_json(place / "scores.json", content)
    except (OSError, RecipeError):
        return


def _texts(folder: Path) -> list[Path]:
    return sorted(file for pattern in KEPT_TEXTS for file in folder.glob(pattern))


def measure_to_json(measure: Measure) -> dict[str, Any]:
    return {**vars(measure), "numerator": measure.numerator.tolist(), "denominator": measure.denominator.tolist()}


def measure_from_json(content: Mapping[str, Any]) -> Measure:
    arrays = {key: np.array(content[key], dtype=np.float64) for key in ("numerator", "denominator")}
    return Measure(**{**content, **arrays})


def stored_measures(work: Run) -> dict[str, dict[str, list[Measure]]]:
    """Stage -> evaluation -> what it gave. A run that is not finished has none: TypeError."""
    return {
        stage: {
            items.name: [measure_from_json(each) for each in read_json(work.scores_file(stage, items))["measures"]]
            for items in work.judged_at(stage)
        }
        for stage in work.models
    }


def scores_of(works: Sequence[Run]) -> Scored:
    """What the results say of the scores of all seeds' runs."""
    main = works[0]
    evaluations = [Judged(items, main.instrument(items)) for items in main.evaluations]
    seeds = [stored_measures(work) for work in works]
    for further in seeds[1:]:
        del further["base"]
    # Without a split the one part holds every row, and is no value of an attribute.
    parts = [part.value for part in main.parts.parts] if main.parts.attribute is not None else []
    return scored(evaluations, judged_models(main), seeds, parts)


def judged_models(work: Run) -> tuple[Model, ...]:
    """Every stage's model, in the order of the results."""
    models = [Model(stage="base", kind="base", name="base")]
    models += [
        Model(stage=job.title, kind="branch", name=part.value)
        for job, part in zip(work.branches, work.parts.parts, strict=True)
    ]
    models += [
        Model(stage=f"control:{control.name}", kind="control", name=control.name) for control in work.recipe.controls
    ]
    return (*models, Model(stage="merged", kind="merged", name="merged"))


def seconds_of(works: Sequence[Run]) -> float:
    """What all of it took, whenever it was done."""
    total = 0.0
    for work in works:
        total += (read_json(work.folder / "merge.json") or {}).get("seconds", 0.0)
        total += sum(read_json(job.folder / "delta.json")["seconds"] for job in work.trainings)
        for stage in work.models if work is works[0] else [stage for stage in work.models if stage != "base"]:
            total += sum(read_json(work.scores_file(stage, items))["seconds"] for items in work.judged_at(stage))
    return round(total, 1)
