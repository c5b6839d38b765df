"""What a run would do, what is done already, and about what it would take, without loading weights.

The figures are estimates: floating-point operations over a measured matrix product's speed, tensors' sizes from the
safetensors headers. They are for deciding where to run, not for comparing methods.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spunge.model.loading import bfloat16_speedup, pick_device
from spunge.recipe.loading import load_recipe
from spunge.recipe.schema import Recipe
from spunge.registry import EXECUTORS, METHODS
from spunge.run.folder import default_folder, require_own
from spunge.run.graph import Cost
from spunge.run.inputs import BaseInputs
from spunge.run.stages.building import Run, build
from spunge.run.stages.naming import RunGraph
from spunge.run.stages.unfinished import losing
from spunge.run.turns import turns
from spunge.unlearning.trained import entries_of
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import written_bytes

EFFICIENCY = 0.35  # share of a large matrix product's speed that a small model's step reaches
DISK = 5e8  # bytes a second that a merge reads and writes
PROCESS = 700 * 2**20  # python, torch and transformers themselves
BATCH = 2**30  # activations and logits of one batch, at the most


@dataclass(frozen=True)
class Step:
    """A stage of the plan."""

    stage: str
    work: str
    done: bool
    seconds: float | None  # None where the model is not here yet


@dataclass(frozen=True)
class Plan:
    folder: str
    stages: list[Step]
    memory: int | None  # bytes of the whole process at its peak
    disk: int | None  # bytes that the run's folder takes
    seconds: float | None  # of what is not done yet, one stage after the other
    at_once: int  # stages that are made at once, at the most
    first: list[str]  # those that are made at once first
    elapsed: float | None  # seconds of what is not done yet, with so many at once
    notes: list[str]  # code that the recipe lets run; on the rows: what is left out; on the folder: what a run refuses

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path | None = None) -> Plan:
    """Read and split the rows, look at the run's folder and the model's headers, and estimate. Writes nothing.

    Raises RecipeError as a run would.
    """
    folder = Path(out or default_folder(recipe)).resolve()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    require_own(folder)
    at_once = EXECUTORS.get(recipe.execution.kind).at_once(recipe.execution, recipe.model)
    begun = build(recipe, folder)
    base, graph = begun.base, begun.graph
    size = _Size.of(base) if base.local and (base.conversion is None or graph.state("conversion").done) else None
    steps = list(_steps(graph, size))
    taken = turns(graph, _to_make(graph, size), at_once)
    return Plan(
        folder=str(folder),
        stages=steps,
        memory=size.memory() if size else None,
        disk=round(sum(stage.cost().kept for stage in graph.stages.values())) if size else None,
        seconds=round(sum(step.seconds or 0 for step in steps if not step.done), 1) if size else None,
        at_once=at_once,
        first=[turn.stage for turn in taken if turn.start == 0.0],
        elapsed=round(max((turn.end for turn in taken), default=0.0), 1) if size else None,
        notes=[*trusted(recipe), *begun.seeds[0].inputs.notes, *_replaced(begun, size)],
    )


def _replaced(begun: Run, size: "_Size | None") -> list[str]:
    """That a run would ask for --replace. Nothing is downloaded to tell it."""
    lost = losing(begun) if size else ""
    told = f"the folder holds finished trainings that no longer fit ({lost}); spunge run asks for --replace"
    return [told] if lost else []


def trusted(recipe: Recipe) -> list[str]:
    """What a recipe names that can run code of others, or is sent texts: a line each."""
    notes = []
    if recipe.model.allow_pickle:
        notes.append(f"model.allow_pickle: pickled weights of {recipe.model.path!r} are read, which can run code")
    if recipe.model.trust_remote_code:
        notes.append(f"model.trust_remote_code: Python that {recipe.model.path!r} carries is run")
    for name, value in _leaves("", recipe.model_dump(mode="json")):
        if isinstance(value, str) and re.fullmatch(r".*\.py:\w+", value, re.DOTALL):
            notes.append(f"{name}: {value!r} is run as Python")
        elif name.endswith(".scorer.base_url"):
            notes.append(f"{name}: prompts and completions are sent to {value!r}")
        elif ".include_path." in name:
            notes.append(f"{name}: Python that the task files in {value!r} name is run")
    return notes


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every plain value of a recipe, with its setting: evaluate.0.kind."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield name, value
        return
    for key, each in inner:
        yield from _leaves(f"{name}.{key}".lstrip("."), each)


def _steps(graph: RunGraph, size: "_Size | None") -> Iterator[Step]:
    """The stages that take time; a model's evaluations in one line."""
    judged: dict[str, list[str]] = {}
    for name, stage in graph.stages.items():
        if "judge:" in name:
            judged.setdefault(name.rpartition("/")[0], []).append(name)
        elif stage.make is not None and name not in ("results", "page") and not name.endswith("recipe"):
            yield _step(graph, size, stage.name, stage.told or stage.title, [name])
    for group, names in judged.items():
        titles = [graph.stages[name].told for name in names]
        yield _step(graph, size, group.replace("judge:", ""), f"judge: {', '.join(titles)}", names)


def _step(graph: RunGraph, size: "_Size | None", shown: str, title: str, names: list[str]) -> Step:
    # The state of a Hub id that is not here is not asked for: nothing is downloaded for a plan.
    done = size is not None and all(graph.state(name).done for name in names)
    if size is None:
        return Step(shown, title, done, None)
    costs = [graph.stages[name].cost() for name in names]
    if watched := sum(size.seconds(Cost(tokens=cost.watched)) for cost in costs):
        title += f", and {duration(watched)} to watch it"
    return Step(shown, title, done, round(sum(map(size.seconds, costs)), 1))


def _to_make(graph: RunGraph, size: "_Size | None") -> dict[str, float]:
    """Stage -> seconds, of those that are not done and take time; where these are not known, all are taken to take the same."""
    stages = [stage for stage in graph.stages.values() if stage.make is not None and not stage.light]
    if size is None:
        return {stage.name: 1.0 for stage in stages}
    return {stage.name: size.seconds(stage.cost()) for stage in stages if not graph.state(stage.name).done}


@dataclass(frozen=True)
class _Size:
    """How big the model is and how fast this machine is."""

    entries: int
    written: int  # bytes of the merged checkpoint
    trained: int  # entries that a branch changes
    speed: float  # floating-point operations a second
    width: int  # bytes an entry takes in memory
    best: int  # bytes more that a trained entry takes, where the best step is held, and that before the last good one

    @classmethod
    def of(cls, base: BaseInputs) -> "_Size":
        model, teach, checkpoint = base.recipe.model, base.recipe.teach, Checkpoint(base.untaught)
        entries = sum(info.numel for info in checkpoint.tensors.values())
        device = pick_device(model.device)
        narrow = model.dtype in ("auto", "bfloat16") and (device.type != "cpu" or bfloat16_speedup() > 1.2)
        reduced = narrow and base.judged.dtype != "float32"  # most of a run's time is judging
        unlearn = base.recipe.unlearn
        trained = 0 if unlearn is None else METHODS.get(unlearn.method).stored_entries(unlearn, checkpoint)
        if teach is not None:
            trained = max(trained, entries_of(teach.trainable, checkpoint))
        speed = _speed(torch.bfloat16 if reduced else torch.float32, device)
        written = written_bytes(checkpoint, base.own_dtype(base.recipe.merge.dtype))
        watch = base.recipe.watch
        best = 8 if watch is not None and watch.chooses else 0
        return cls(entries, written, trained, speed, 2 if reduced else 4, best)

    def seconds(self, cost: Cost) -> float:
        return 2 * self.entries * (cost.tokens + cost.watched) / self.speed + cost.nbytes / DISK

    def memory(self) -> int:
        # A trained entry is held as float32 with its gradient and Adam's two moments: 16 bytes.
        return PROCESS + BATCH + self.entries * self.width + (16 + self.best) * self.trained


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second that a device reaches on a model's step; the CPU's where there is no such device here."""
    there = device.type == "cuda" and torch.cuda.is_available()
    size, where = (8192, device) if there else (768, torch.device("cpu"))
    left, right = (torch.ones(size, size, dtype=dtype, device=where) for _ in range(2))
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # a card is asked for a value, and so waited for
        best = min(best, time.perf_counter() - started)
    return EFFICIENCY * 2 * size**3 / best


def plan_text(planned: Plan) -> str:
    """The plan as a person reads it."""
    width = max(len(step.stage) for step in planned.stages)
    lines = [f"run folder: {planned.folder}", ""]
    for step in planned.stages:
        mark = "done" if step.done else "to do"
        taken = f"about {duration(step.seconds)}" if step.seconds is not None and not step.done else ""
        lines.append(f"{mark:6} {step.stage:{width}}  {step.work}  {taken}".rstrip())
    lines.append("")
    if planned.memory is None or planned.disk is None or planned.seconds is None:
        lines.append("memory, disk and time: unknown until the model is downloaded")
    else:
        lines.append(
            f"about {planned.memory / 2**30:.1f} GiB of memory, {planned.disk / 2**30:.2f} GiB of disk, "
            f"{duration(planned.seconds)} for what is to do"
        )
    if planned.at_once > 1 and planned.first:
        about = "" if planned.elapsed is None else f"about {duration(planned.elapsed)} for what is to do; "
        first = ", ".join(planned.first[: planned.at_once])
        lines.append(f"up to {planned.at_once} stages at once, each with memory of its own: {about}first {first}")
    return "\n".join([*lines, *(f"note: {note}" for note in planned.notes)])


def duration(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
