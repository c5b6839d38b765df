"""Every stage's model is judged by every evaluation; the scores, their differences and intervals make results.json.

What is kept are the items' measurements (RUN/evaluation/STAGE/), so that statistics are made anew without judging again.
The base's are kept across runs too, in the folder that SPUNGE_CACHE names (by default spunge in the user's cache folder).
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spunge.data.items import Items
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Finetune, Judges, Measure
from spunge.evaluation.statistics import difference, recovery, score, worst
from spunge.files import cache_folder, read_json, write_json
from spunge.model.loading import Base
from spunge.progress import Watcher
from spunge.registry import EVALUATORS
from spunge.run.jobs import Job, Run
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.overlay import applied, overlaid, swapped

WORST = "worst"  # the subject under which a metric's worst subject is reported
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
        progress=lambda done, total: watcher.step(done, total),
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
    arrays = {key: getattr(measure, key).tolist() for key in ("numerator", "denominator")}
    return {**vars(measure), **arrays}


def measure_from_json(content: Mapping[str, Any]) -> Measure:
    arrays = {key: np.array(content[key], dtype=np.float64) for key in ("numerator", "denominator")}
    return Measure(**{**content, **arrays})


class Measured(NamedTuple):
    """One metric of one evaluation at one stage: a measure for each seed (of the base, one for all)."""

    evaluation: Items
    measures: list[Measure]

    @property
    def subjects(self) -> dict[str, np.ndarray]:
        """Subject -> its items."""
        first = self.measures[0]
        if first.subject is not None:
            return {first.subject: np.arange(len(first.numerator))}
        return dict(self.evaluation.subjects)


Key = tuple[str, str, str]  # evaluation, metric, the measure's own subject or nothing


def results_content(works: Sequence[Run]) -> dict[str, Any]:
    """What results.json says of the scores: rows, paired differences, what comes back after attacks. One run a seed."""
    main = works[0]
    stages = {stage: measured(works, stage) for stage in main.models}
    rows = [row for stage, found in stages.items() for row in _rows(stage, found)]
    _refuse_twice(rows)
    controls = [stage for stage in stages if stage.startswith("control:")]
    pairs = [(stage, "base") for stage in stages if stage != "base"]
    pairs += [("merged", control) for control in controls]
    return {
        "rows": rows,
        "differences": [row for stage, against in pairs for row in _differences(stage, against, stages)],
        "recovered": [row for stage in stages if stage != "base" for row in _recovered(stage, stages)],
        "evaluations": [_described(main, items, stages) for items in main.evaluations],
        "published": [entry.model_dump(mode="json") for entry in main.recipe.published],
        "seeds": len(works),
    }


def measured(works: Sequence[Run], stage: str) -> dict[Key, Measured]:
    """What a stage's evaluations gave, at every seed. A run that is not finished has none: TypeError."""
    found: dict[Key, Measured] = {}
    for work in works[:1] if stage == "base" else works:
        for items in work.judged_at(stage):
            stored = read_json(work.scores_file(stage, items))
            for measure in map(measure_from_json, stored["measures"]):
                key = (items.name, measure.metric, measure.subject or "")
                found.setdefault(key, Measured(items, [])).measures.append(measure)
    return found


def _rows(stage: str, found: Mapping[Key, Measured]) -> Iterator[dict[str, Any]]:
    for each in found.values():
        first = each.measures[0]
        extra: dict[str, Any] = {"of": first.of} if first.of is not None else {}
        extra |= {"side": True} if first.side else {}
        scores = {subject: score(each.measures, members) for subject, members in each.subjects.items()}
        groups = each.evaluation.subjects
        overall = each.evaluation.settings.subject
        parts = {subject: members for subject, members in groups.items() if subject != overall}
        if first.worst and len(parts) > 1:
            scores[WORST if overall in (None, "all") else f"{WORST} of {overall}"] = worst(each.measures, parts)
        for subject, found_score in scores.items():
            optional = {key: value for key, value in found_score._asdict().items() if value is not None}
            yield {"stage": stage, "subject": subject, **optional, **extra}


def _refuse_twice(rows: Sequence[Mapping[str, Any]]) -> None:
    seen = set()
    for row in rows:
        key = (row["stage"], row["subject"], row["metric"])
        if key in seen:
            raise RecipeError(
                f"evaluate.subject: two evaluations report {row['metric']!r} on {row['subject']!r}; give one of them a "
                "subject of its own (nothing is judged again then)"
            )
        seen.add(key)


def _differences(stage: str, against: str, stages: Mapping[str, Mapping[Key, Measured]]) -> Iterator[dict[str, Any]]:
    for key, each in stages[stage].items():
        other = stages[against].get(key)
        if other is None:
            continue
        for subject, members in each.subjects.items():
            found = difference(each.measures, other.measures, members)
            yield {"stage": stage, "against": against, "subject": subject, **found._asdict()}


def _recovered(stage: str, stages: Mapping[str, Mapping[Key, Measured]]) -> Iterator[dict[str, Any]]:
    """How much of what was forgotten an attack brings back, by subject."""
    for each in stages[stage].values():
        attacked = each.measures[0]
        of: str = getattr(each.evaluation.settings, "of", None) or ""
        key = (of, attacked.of or "", attacked.subject or "")
        before, after = stages["base"].get(key), stages[stage].get(key)
        if attacked.of is None or before is None or after is None:
            continue
        for subject, members in each.subjects.items():
            found = recovery(before.measures, after.measures, each.measures, members)
            if found is not None:
                row = {"stage": stage, "subject": subject, "metric": attacked.metric, "of": attacked.of}
                yield {**row, **found._asdict()}


def _described(work: Run, items: Items, stages: Mapping[str, Mapping[Key, Measured]]) -> dict[str, Any]:
    metrics = dict.fromkeys(key[1] for found in stages.values() for key in found if key[0] == items.name)
    content: dict[str, Any] = {"name": items.name, "kind": items.settings.kind, "metrics": list(metrics)}
    # The subject that holds all rows, those of the parts to forget among them.
    if {part.value for part in work.parts.parts} & items.subjects.keys() - {items.settings.subject}:
        content["overall"] = items.settings.subject
    return {**content, "rows": items.sha256[:12], "instrument": work.instrument(items)}


def seconds_of(works: Sequence[Run]) -> float:
    """What all of it took, whenever it was done."""
    total = 0.0
    for work in works:
        total += (read_json(work.folder / "merge.json") or {}).get("seconds", 0.0)
        total += sum(read_json(job.folder / "delta.json")["seconds"] for job in work.trainings)
        for stage in work.models if work is works[0] else [stage for stage in work.models if stage != "base"]:
            total += sum(read_json(work.scores_file(stage, items))["seconds"] for items in work.judged_at(stage))
    return round(total, 1)
