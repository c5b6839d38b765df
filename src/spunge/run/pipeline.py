"""The stages in order: split, unlearn each part, run the controls, merge, judge, report. What is done is not done again."""

import gc
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from spunge.data.selection import split_content
from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Judges
from spunge.files import fingerprint, mark_done, read_json, unwritable, write_json, write_text
from spunge.model.loading import Base, load_base, model_depth
from spunge.progress import Silent, Watcher
from spunge.recipe.loading import dump_recipe, load_recipe
from spunge.recipe.schema import MethodSettings, Recipe
from spunge.registry import METHODS
from spunge.run.jobs import Job, Run, alone, claim
from spunge.run.judging import delta_sources, judge, results_content, seconds_of, starting
from spunge.unlearning.finetuning import finetune
from spunge.unlearning.method import Store, Task
from spunge.weights.delta import write_delta
from spunge.weights.overlay import moves

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    """A finished run: its folder and the content of its `results.json`."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def value(self, stage: str, subject: str, metric: str) -> float:
        """One figure. Raises KeyError when it was not measured."""
        for row in self.rows:
            if (row["stage"], row["subject"], row["metric"]) == (stage, subject, metric):
                return float(row["value"])
        raise KeyError((stage, subject, metric))


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path | None = None, watcher: Watcher | None = None
) -> Results:
    """Do everything that a recipe asks for and that its folder does not hold yet.

    recipe: a Recipe, a mapping, a YAML file or a shipped recipe's name. out: the run's folder, `runs/NAME` by default.
    Raises RecipeError when the recipe, its data or the folder is wrong.
    """
    watcher = watcher or Silent()
    if not isinstance(recipe, Recipe):
        out = out or default_folder(recipe)
        recipe = load_recipe(recipe)
    works = seeded(recipe, Path(out or "runs/run").resolve())
    main = works[0]
    try:
        memory, judges = _Memory(main), Judges()
        claim(main)
        with alone(main.folder):
            for work in works[1:]:
                claim(work)
            for work in works:
                _carry_out(work, memory, judges, watcher)
            content = _results(works, memory)
            write_json(main.folder / "results.json", content)
    except OSError as error:
        if isinstance(error.filename, str | Path) or error.errno is not None:
            raise unwritable(Path(error.filename or main.folder / "file"), error) from error
        raise
    from spunge.report.page import write_page

    write_page(main.folder)
    return Results(main.folder, content)


def seeded(recipe: Recipe, folder: Path) -> list[Run]:
    """A run for each seed: the first in RUN itself, the others in RUN/seeds/SEED. The base is judged in the first alone."""
    works = [Run(recipe, folder)]
    for seed in range(recipe.seed + 1, recipe.seed + recipe.seeds):
        another = recipe.model_copy(update={"seed": seed, "seeds": 1})
        works.append(Run(another, folder / "seeds" / str(seed), folder))
    return works


def _carry_out(work: Run, memory: "_Memory", judges: Judges, watcher: Watcher) -> None:
    """Everything of one seed but its results."""
    watcher.begin("read and split the rows")
    split = split_content(work.parts, work.retained)
    for items in work.evaluations:
        work.instrument(items)  # a scorer that is not to be had is said now, not after the training
    sizes = ", ".join(f"{part['value']}: {part['selected']}" for part in split["parts"])
    watcher.end("; ".join([sizes, *split["notes"]]))
    watcher.begin("fingerprint the base")
    _ = work.base_key
    watcher.end(work.weights[:12])
    write_text(work.folder / "recipe.yaml", dump_recipe(work.recipe))
    write_json(work.folder / "split.json", split)
    for job in work.trainings:
        unlearn(work, job, memory, watcher)
    memory.kept.clear()
    merge_branches(work, watcher)
    for stage in work.models:
        if work.unscored(stage):
            judge(work, stage, memory.base, judges, finetune, watcher)


class _Memory:
    """The base in memory, loaded when first needed and then kept: whole, or until then its first blocks alone."""

    def __init__(self, work: Run) -> None:
        self._work = work
        self._first: dict[int, Base] = {}  # last block -> the base without those above it
        self.kept: Store = {}  # activations of the base that trainings share

    @cached_property
    def base(self) -> Base:
        self._first.clear()
        gc.collect()
        return load_base(self._work.base_folder, self._work.recipe.model)

    def first_blocks(self, last: int | None) -> Base:
        """A base with blocks 0..last at the least; None: all of it, with the output layer."""
        if last is None or "base" in vars(self):
            return self.base
        if last not in self._first:
            self._first = {last: load_base(self._work.base_folder, self._work.recipe.model, last)}
        return self._first[last]

    @property
    def loaded(self) -> Base | None:
        return vars(self).get("base") or next(iter(self._first.values()), None)


def default_folder(recipe: Any) -> Path:
    """runs/NAME, after the recipe's file."""
    return Path("runs") / (Path(str(recipe)).stem if isinstance(recipe, str | Path) else "run")


def unlearn(work: Run, job: Job, memory: _Memory, watcher: Watcher) -> None:
    """Train one branch or control, unless its folder holds it already."""
    if work.done(job):
        return
    recipe = work.recipe
    settings, notes = settled(work, memory, watcher)
    watcher.begin(f"unlearn {job.title}")
    base = _base_for(work, settings, memory)
    started = time.perf_counter()
    (job.folder / "done.json").unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    state = job.folder / f"state-{work.key(job)[:12]}.pt"
    for other in job.folder.glob("state-*"):
        if other != state:
            other.unlink()
    task = Task(
        base=base,
        parts={part.value: part.samples for part in job.parts},
        retain=work.retain,
        seeds={part.value: seed_for(recipe.seed, "branch", part.value) for part in job.parts},
        log=job.folder / "log.jsonl",
        state=state,
        kept=memory.kept if job.after is None else {},  # of another model: a store of its own
        progress=lambda step, steps, loss: watcher.step(step, steps, f"loss {loss:.4g}"),
    )
    with starting(job, base):
        branch = METHODS.get(settings.method).unlearn(task, settings)
    seconds = time.perf_counter() - started
    delta = write_delta(
        job.folder,
        branch.changes,
        {
            "base": work.weights,
            "method": settings.method,
            "settings": settings.model_dump(mode="json"),
            "parts": [{"value": p.value, "rows": len(p.samples), "sha256": p.samples.sha256} for p in job.parts],
            "seeds": dict(task.seeds),
            "steps": branch.steps,
            "stopped": branch.stopped,
            "losses": dict(branch.losses),
            "notes": {**notes, **branch.notes},
            "seconds": round(seconds, 2),
            "device": str(base.device),
            "dtype": str(base.dtype).removeprefix("torch."),
        },
    )
    if not moves(base.parameters, delta):
        raise RecipeError(
            f"unlearn.learning_rate: all that {job.title} changed is lost in rounding when it is added to the base; "
            "raise it, or the number of steps"
        )
    mark_done(job.folder, work.key(job))
    state.unlink(missing_ok=True)
    watcher.end(f"{branch.steps} steps in {seconds:.0f} s" + (f" ({branch.stopped})" if branch.stopped else ""))


class _Chosen(NamedTuple):
    settings: MethodSettings
    notes: Mapping[str, Any]


def settled(work: Run, memory: _Memory, watcher: Watcher) -> _Chosen:
    """The method's settings, with every `auto` in them chosen by the method: once per run, kept in RUN/settled.json.

    All branches and controls of a run have one choice, also when the rows of one part change later: the rows of the
    parts are therefore no part of the fingerprint.
    """
    unlearn = work.recipe.unlearn
    settle = getattr(METHODS.get(unlearn.method), "settle", None)
    undecided = [name for name, value in unlearn if value == "auto"]
    if settle is None or not undecided:
        return _Chosen(unlearn, {})
    key = fingerprint(
        {
            "base": work.base_key,
            "unlearn": unlearn.model_dump(mode="json"),
            "version": METHODS.version(unlearn.method),
            "retain": work.retain.sha256 if work.retain else None,
            "seed": work.recipe.seed,
        }
    )
    stored = read_json(work.folder / "settled.json") or {}
    if stored.get("fingerprint") != key:
        watcher.begin(f"choose unlearn.{', '.join(undecided)}")
        started = time.perf_counter()
        parts = {part.value: part.samples for part in work.parts.parts}
        found = settle(memory.base, parts, work.retain, unlearn, work.recipe.seed)
        stored = {
            "fingerprint": key,
            "settings": found.settings.model_dump(mode="json"),
            "notes": dict(found.notes),
            "seconds": round(time.perf_counter() - started, 2),
            "measured": found.measured,
        }
        write_json(work.folder / "settled.json", stored)
        watcher.end("; ".join(map(str, found.notes.values())))
    return _Chosen(type(unlearn).model_validate(stored["settings"]), stored["notes"])


def _base_for(work: Run, settings: Any, memory: _Memory) -> Base:
    """What training needs of the base: its first blocks where the method says that these are enough."""
    last_block = getattr(METHODS.get(settings.method), "last_block", None)
    if last_block is None:
        return memory.base
    return memory.first_blocks(last_block(settings, model_depth(work.base_folder, work.recipe.model)))


def merge_branches(work: Run, watcher: Watcher) -> None:
    """Merge the branches' deltas into RUN/merged, unless that is done already."""
    if work.merged:
        return
    from spunge.merging.engine import merge

    watcher.begin("merge")
    started = time.perf_counter()
    (work.folder / "merge.json").unlink(missing_ok=True)
    report = merge(
        work.base_folder,
        delta_sources(work.branches),
        work.recipe.merge,
        work.folder / "merged",
        progress=lambda done, total: watcher.step(done, total),
    )
    seconds = round(time.perf_counter() - started, 2)
    write_json(
        work.folder / "merge.json", {"fingerprint": work.model_key("merged"), "seconds": seconds, **report.to_json()}
    )
    watcher.end(f"{len(report.changed)} tensors changed")


def _results(works: Sequence[Run], memory: _Memory) -> dict[str, Any]:
    """The content of results.json."""
    main = works[0]
    earlier = read_json(main.folder / "results.json") or {}
    loaded = memory.loaded
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "schema": SCHEMA,
        "spunge": version("spunge"),
        "attribute": main.parts.attribute,
        "parts": [{"value": part.value, "slug": part.slug} for part in main.parts.parts],
        "stages": list(main.models),
        "versions": versions(),
        "device": str(loaded.device) if loaded else earlier.get("device"),
        "dtype": str(loaded.dtype).removeprefix("torch.") if loaded else earlier.get("dtype"),
        "seconds": seconds_of(works),
        "peak_memory": usage,
        **results_content(works),
    }


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    import platform

    found = {"python": platform.python_version(), "spunge": version("spunge")}
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "duckdb", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
