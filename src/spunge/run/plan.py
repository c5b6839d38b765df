"""What a run would do, what is done already, and about what it would take, without loading weights.

The figures are estimates: floating-point operations over a measured matrix product's speed, tensors' sizes from the
safetensors headers. They are for deciding where to run, not for comparing methods.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spunge.data.items import Items
from spunge.data.samples import Samples
from spunge.data.selection import split_content
from spunge.model.architecture import DOWN_PROJECTIONS
from spunge.model.loading import bfloat16_speedup, pick_device
from spunge.recipe.loading import load_recipe
from spunge.recipe.schema import Recipe
from spunge.registry import METHODS
from spunge.run.jobs import Job, Run, claim
from spunge.run.pipeline import seeded
from spunge.weights.checkpoint import Checkpoint

EFFICIENCY = 0.35  # share of a large matrix product's speed that a small model's step reaches
PROCESS = 700 * 2**20  # python, torch and transformers themselves
BATCH = 2**30  # activations and logits of one batch, at the most
LETTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Stage:
    stage: str
    work: str
    done: bool
    seconds: float | None  # None where the model is not here yet


@dataclass(frozen=True)
class Plan:
    folder: str
    stages: list[Stage]
    memory: int | None  # bytes of the whole process at its peak
    disk: int | None  # bytes that the run's folder takes
    seconds: float | None  # of what is not done yet
    notes: list[str] = field(default_factory=list)  # on the rows: what is left out, what looks like a slip

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path = "runs/run") -> Plan:
    """Read and split the rows, look at the run's folder and the model's headers, and estimate. Writes nothing.

    Raises RecipeError as a run would.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    works = seeded(recipe, Path(out).resolve())
    main = works[0]
    if (main.folder / "recipe.yaml").exists():
        claim(main)
    local = Path(recipe.model.path).is_dir()
    # A Hub id that is not here: nothing is downloaded for a plan.
    size = _Size.of(main) if local or recipe.model.path.startswith((".", "/", "~")) else None
    stages = [stage for work in works for stage in _stages(work, size, work is not main)]
    return Plan(
        folder=str(main.folder),
        stages=stages,
        memory=size.memory() if size else None,
        disk=sum(size.disk(len(work.trainings)) for work in works) if size else None,
        seconds=round(sum(stage.seconds or 0 for stage in stages if not stage.done), 1) if size else None,
        notes=split_content(main.parts, main.retained)["notes"],
    )


def _stages(work: Run, size: "_Size | None", further: bool) -> Iterator[Stage]:
    """What one seed's run does. further: it is not the first, so that the base is judged already."""
    unlearn: Any = work.recipe.unlearn
    mark = f"seed {work.recipe.seed}: " if further else ""
    resumed = Path(work.recipe.model.path).is_dir() and (work.folder / "recipe.yaml").exists()
    for job in work.trainings:
        steps = sum(unlearn.steps_of({part.value: len(part.samples) for part in job.parts}).values())
        title = f"unlearn {', '.join(part.value for part in job.parts)} ({steps} steps)"
        seconds = size.training(steps, job, work.recipe) if size else None
        yield Stage(mark + job.title, title, resumed and work.done(job), seconds)
    seconds = size.merging(len(work.branches)) if size else None
    title = f"{work.recipe.merge.rule} of {len(work.branches)} branches"
    yield Stage(f"{mark}merge", title, resumed and work.merged, seconds)
    for stage in work.models:
        judged = work.judged_at(stage)
        if judged and not (further and stage == "base"):
            seconds = size.judging(judged) if size else None
            names = ", ".join(items.name for items in judged)
            yield Stage(mark + stage, f"judge: {names}", resumed and not work.unscored(stage), seconds)


@dataclass(frozen=True)
class _Size:
    """How big the model is and how fast this machine is."""

    entries: int
    nbytes: int
    trained: int  # entries that a branch changes
    speed: float  # floating-point operations a second
    width: int  # bytes an entry takes in memory
    depth: int  # blocks

    @classmethod
    def of(cls, work: Run) -> "_Size":
        checkpoint = Checkpoint(work.base_folder)
        entries = sum(info.numel for info in checkpoint.tensors.values())
        cpu = pick_device(work.recipe.model.device).type == "cpu"
        reduced = work.recipe.model.dtype in ("auto", "bfloat16") and (not cpu or bfloat16_speedup() > 1.2)
        dtype = torch.bfloat16 if reduced else torch.float32
        trained = _trained_entries(work.recipe.unlearn, checkpoint)
        config = json.loads((work.base_folder / "config.json").read_text())
        depth = config.get("num_hidden_layers") or config.get("n_layer") or 1
        return cls(entries, checkpoint.nbytes, trained, _speed(dtype), 2 if reduced else 4, depth)

    def training(self, steps: int, job: Job, recipe: Recipe) -> float:
        unlearn: Any = recipe.unlearn
        length: float = min(_mean_tokens([part.samples for part in job.parts]), unlearn.max_length)
        tokens = steps * unlearn.batch_size * unlearn.accumulation * length
        passes: float = METHODS.get(unlearn.method).passes(unlearn, self.depth)
        return round(float(2 * self.entries * tokens * passes / self.speed), 1)

    def judging(self, evaluations: list[Items]) -> float:
        letters: int = sum(items.table.nbytes for items in evaluations)
        tokens = letters / LETTERS_PER_TOKEN + sum(map(_written_tokens, evaluations))
        return round(2 * self.entries * tokens / self.speed, 1)

    def merging(self, branches: int) -> float:
        return round((self.nbytes + 8 * self.trained * branches) / 5e8, 1)

    def memory(self) -> int:
        # A trained entry is held as float32 with its gradient and Adam's two moments: 16 bytes.
        return PROCESS + BATCH + self.entries * self.width + 16 * self.trained

    def disk(self, deltas: int) -> int:
        return self.nbytes + deltas * 4 * self.trained


def _written_tokens(items: Items) -> int:
    """Tokens of the completions that an evaluation asks for, at most."""
    settings = getattr(items.settings, "generation", None)
    return items.table.num_rows * settings.samples * settings.max_new_tokens if settings else 0


def _trained_entries(unlearn: Any, checkpoint: Checkpoint) -> int:
    """Entries that one branch trains: the factors of LoRA, the chosen tensors, or all; or brings, where nothing is trained."""
    if (stored := getattr(unlearn, "stored_entries", None)) is not None:
        return int(stored(checkpoint))
    what = getattr(unlearn, "trainable", None)
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    if what is None:
        sizes = [info.numel for info in matrices if any(f".{name}.weight" in info.name for name in DOWN_PROJECTIONS)]
        return sum(sorted(sizes)[-3:])
    if what.kind == "lora":
        named = what.targets if isinstance(what.targets, list) else ["q_proj", "v_proj", "query_key_value", "c_attn"]
        chosen = [
            info for info in matrices if what.targets == "all-linear" or any(f".{name}." in info.name for name in named)
        ]
        return sum(what.rank * sum(info.shape) for info in chosen)
    if what.kind == "tensors":
        import fnmatch

        return sum(i.numel for i in checkpoint.tensors.values() if any(fnmatch.fnmatch(i.name, p) for p in what.match))
    return sum(info.numel for info in checkpoint.tensors.values())


def _mean_tokens(samples: list[Samples]) -> float:
    letters: int = sum(each.table.nbytes for each in samples)
    return letters / LETTERS_PER_TOKEN / max(1, sum(len(each) for each in samples))


def _speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second that this machine reaches on a model's step."""
    size = 768
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return EFFICIENCY * 2 * size**3 / best


def plan_text(planned: Plan) -> str:
    """The plan as a person reads it."""
    width = max(len(stage.stage) for stage in planned.stages)
    lines = [f"run folder: {planned.folder}", ""]
    for stage in planned.stages:
        mark = "done" if stage.done else "to do"
        taken = f"about {_duration(stage.seconds)}" if stage.seconds is not None and not stage.done else ""
        lines.append(f"{mark:6} {stage.stage:{width}}  {stage.work}  {taken}".rstrip())
    lines.append("")
    if planned.memory is None or planned.disk is None or planned.seconds is None:
        lines.append("memory, disk and time: unknown until the model is downloaded")
    else:
        lines.append(
            f"about {planned.memory / 2**30:.1f} GiB of memory, {planned.disk / 2**30:.2f} GiB of disk, "
            f"{_duration(planned.seconds)} for what is to do"
        )
    return "\n".join([*lines, *planned.notes])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
