"""The check's steps, each a function that notes what it measures as it goes. `check.py` runs them in a process of its own."""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from counts import operations
from shapes import SHAPES, Shape, build, tensors, write_tokenizer

GIB = 2**30
WARM = 3  # first steps that are left out of the rate: they load and choose kernels
Note = Callable[..., None]  # keeps figures, which a step that fails later has then given all the same


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured, on which device."""

    device: str
    work: Path
    steps: int
    shapes: Mapping[str, tuple[str, int, int]]  # 1b, 7b -> a shape, texts of a batch, tokens of a text
    rank: int  # of LoRA
    matrix: int  # side of the square product
    copied: int  # bytes

    def shape(self, model: str) -> Shape:
        return SHAPES[self.shapes[model][0]]


def full(work: Path) -> Size:
    shapes = {"1b": ("1B-llama3", 8, 512), "7b": ("7B-mistral", 4, 512)}
    return Size("cuda", work, 20, shapes, 16, 8192, 4 * GIB)


def toy(work: Path) -> Size:
    return Size("cpu", work, 5, {"1b": ("toy", 2, 16), "7b": ("toy", 2, 16)}, 1, 512, 2**24)


# ---- the device


def card(size: Size, note: Note) -> None:
    """What the device is, and the rates that it reaches."""
    import accelerate
    import numpy
    import peft
    import transformers

    packages = {each.__name__: each.__version__ for each in (torch, transformers, peft, accelerate, numpy)}
    note(python=platform.python_version(), **packages, cores=os.cpu_count())
    if size.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        note(card=about.name, memory_gib=about.total_memory / GIB, cuda=torch.version.cuda)
    left, right = (torch.randn(size.matrix, size.matrix, device=size.device).bfloat16() for _ in range(2))
    note(matmul_tflops=2 * size.matrix**3 / _seconds(size, lambda: left @ right) / 1e12)
    source = torch.randint(0, 255, (size.copied,), dtype=torch.uint8, device=size.device)
    target = torch.empty_like(source)
    note(copy_gb_s=2 * size.copied / _seconds(size, lambda: target.copy_(source)) / 1e9)


def _seconds(size: Size, call: Callable[[], object], rounds: int = 20) -> float:
    """The median time of a call, after three that are not counted."""
    taken = []
    for _ in range(rounds + 3):
        _wait(size)
        started = time.perf_counter()
        call()
        _wait(size)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


def _wait(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


# ---- models and texts


def model(size: Size, note: Note, name: str) -> None:
    """Write a model of random weights, which are drawn on the device, and texts of random words."""
    started = time.perf_counter()
    shape, batch, length = size.shape(name), *size.shapes[name][1:]
    folder = build(size.work / name, shape, device=size.device)
    vocabulary = min(32_000, shape.vocabulary)
    write_tokenizer(folder, vocabulary)
    entries = sum(math.prod(dimensions) for _, dimensions in tensors(shape))
    note(entries=entries, seconds=time.perf_counter() - started, folder=str(folder))
    # Each text comes once: with texts that come again, RMU keeps activations and does less.
    for seed, side in enumerate(("forget", "retain")):
        words = random.Random(seed)
        rows = [
            {
                "part": f"part {row % 2}",
                "text": " ".join(f"w{words.randrange(3, vocabulary)}" for _ in range(length)),
            }
            for row in range((size.steps + 2) * batch)
        ]
        (size.work / f"{name}-{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class Way:
    """A method, and settings of a recipe beside it."""

    method: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unlearn: Mapping[str, Any] = dataclasses.field(default_factory=dict)


AGAIN = {"checkpoint_activations": True}
WAYS = {
    **{method: Way(method) for method in ("rmu", "tvn", "npo", "ga")},
    "npo_again": Way("npo", AGAIN),
    "npo_4bit": Way("npo", {"train_in": "4bit"}),
    "npo_8bit": Way("npo", {"train_in": "8bit"}),
    "npo_4bit_again": Way("npo", {"train_in": "4bit", **AGAIN}),
    "ga_adam_8bit": Way("ga", AGAIN, {"optimizer": "adamw_8bit"}),
}


def _recipe(size: Size, name: str, chosen: str, batch: int, **changes: Any) -> dict[str, Any]:
    """A recipe as a user would write it."""
    way, length = WAYS[chosen], size.shapes[name][2]
    method = way.method
    unlearn: dict[str, Any] = {
        "method": method,
        "steps": size.steps,
        "batch_size": batch,
        "max_length": length,
        "max_damage": None,  # random weights have nothing to lose: every step is taken
        **way.unlearn,
    }
    if method == "rmu":
        unlearn["layer"] = _layer(size.shape(name))
    else:
        factors = {"kind": "lora", "rank": size.rank, "targets": "all-linear"}
        unlearn["trainable"] = {"kind": "all"} if method == "ga" else factors
    return {
        "model": {"path": str(size.work / name), "dtype": "bfloat16", "device": size.device, **way.model},
        "forget": {"source": str(size.work / f"{name}-forget.jsonl")},
        "retain": {"source": str(size.work / f"{name}-retain.jsonl")},
        "unlearn": unlearn,
        "controls": [],
        **changes,
    }


def _layer(shape: Shape) -> int:
    return max(2, round(0.23 * shape.layers))  # block 7 of 32, as published


# ---- training


def training(size: Size, note: Note, name: str, chosen: str) -> None:
    """Steps of a method through the code that `spunge run` runs, and what `spunge plan` says of them."""
    batch = size.shapes[name][1]
    planned = _planned(size, _recipe(size, name, chosen, batch))
    note(batch=batch, **planned)
    measured = _trained(size, name, chosen, batch)
    note(**measured)
    note(
        memory_over_plan=measured["peak_gib"] / planned["planned_gib"],
        time_over_plan=measured["seconds"] / planned["planned_seconds"],
    )


def _planned(size: Size, recipe: dict[str, Any]) -> dict[str, float]:
    import spunge

    planned = spunge.plan(recipe, size.work / "planned")
    seconds = sum(stage.seconds or 0.0 for stage in planned.stages if stage.stage.startswith("branch"))
    return {"planned_gib": (planned.memory or 0) / GIB, "planned_seconds": max(seconds, 1e-3)}


def _trained(size: Size, name: str, chosen: str, batch: int) -> dict[str, Any]:
    from spunge.data.samples import Samples
    from spunge.model.loading import load_base, model_depth
    from spunge.recipe.loading import load_recipe
    from spunge.registry import METHODS
    from spunge.run.inputs import BaseInputs, SeedInputs
    from spunge.unlearning.method import Task

    recipe, method = load_recipe(_recipe(size, name, chosen, batch)), WAYS[chosen].method
    inputs, way = SeedInputs(recipe, BaseInputs(recipe, size.work / "planned")), METHODS.get(method)
    folder = inputs.base.folder
    last = None if way.last_block is None else way.last_block(recipe.unlearn, model_depth(folder, recipe.model))
    _emptied(size)
    started = time.perf_counter()
    base = load_base(folder, recipe.model, last)
    _wait(size)
    loaded = time.perf_counter() - started
    marks: list[float] = []  # the beginning, and the end of each step

    def progress(_done: int, _total: int, _note: str = "", /) -> None:
        _wait(size)
        marks.append(time.perf_counter())

    parts: dict[str, Samples] = {part.value: part.samples for part in inputs.parts.parts}
    log = size.work / f"{name}-{chosen}.jsonl"
    task = Task(base, parts, inputs.retain, dict.fromkeys(parts, 0), log, progress=progress, kept={})
    marks.append(time.perf_counter())
    branch = way.unlearn(task, recipe.unlearn)
    _wait(size)
    taken, peak = time.perf_counter() - marks[0], _peak(size)
    warm = min(WARM, branch.steps - 1)
    a_step = (marks[-1] - marks[warm]) / (branch.steps - warm)
    tokens = dict.fromkeys(("forget", "retain"), batch * size.shapes[name][2])
    used = tokens if method in ("rmu", "npo") else {"forget": tokens["forget"]}
    work = operations(method, size.shape(name), tokens, _layer(size.shape(name)))
    del base, task
    first, final = (json.loads(line)["loss"] for line in (log.read_text().splitlines()[at] for at in (0, -1)))
    return {
        "steps": branch.steps,
        "load_seconds": loaded,
        "seconds": taken,
        "first_step": marks[1] - marks[0],
        "step_seconds": a_step,
        "tokens_s": sum(used.values()) / a_step,
        "tflops": work / a_step / 1e12,
        "loss_first": first,
        "loss_last": final,
        **peak,
        **branch.notes,  # such as batches that did not fit
    }


def forms(size: Size, note: Note, name: str) -> None:
    """Seconds of an NPO step with LoRA in the forms of a GPU, with each of them left out, and by plain peft.

    Ours is with the default's dropout and calls the base for each text, which comes once; plain is without dropout."""
    import train

    from spunge.unlearning.forms import FORMS

    now, before = FORMS["cuda"], FORMS[size.device]
    kinds = {
        "now": now,
        "cast_one_by_one": dataclasses.replace(now, cast_at_once=False),
        "norm_of_ours": dataclasses.replace(now, norm_by_torch=False),
        "dropout_one_by_one": dataclasses.replace(now, one_dropout=False),
        "pieces_of_1_gib": dataclasses.replace(now, piece=1 << 30),
        "layers_of_peft": dataclasses.replace(now, layers=False),
    }
    short, batch = dataclasses.replace(size, steps=min(size.steps, 10)), size.shapes[name][1]
    try:
        for kind, chosen in kinds.items():
            FORMS[size.device] = chosen
            measured = _trained(short, name, "npo", batch)
            note(**{f"{kind}_s": measured["step_seconds"], f"{kind}_gib": measured["peak_gib"]})
    finally:
        FORMS[size.device] = before
    train.TOKENS = size.shapes[name][1:]
    _emptied(size)
    step = train.plain("npo", "lora", str(size.work / name), "bfloat16")
    note(plain_s=statistics.median([train.seconds(step) for _ in range(short.steps)][1:]), **_peak(size))


def heads(size: Size, note: Note, name: str) -> None:
    """The cross-entropy behind an output layer, forward and backward, by our pieces and by liger-kernel's fused one:
    milliseconds, the memory beside states and weights, and how far loss and gradient are from float64's."""
    from torch.nn.functional import cross_entropy

    from spunge.data.samples import token_losses
    from spunge.unlearning.forms import forms_of
    from spunge.unlearning.scored import Scored

    shape, (batch, length) = size.shape(name), size.shapes[name][1:]
    _emptied(size)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=size.device).mul_(0.02).bfloat16()
    states = torch.randn(batch * length, shape.hidden, device=size.device).bfloat16().requires_grad_(True)
    labels = torch.randint(0, shape.vocabulary, (len(states),), device=size.device)
    piece = max(1, forms_of(states.device).piece // (4 * shape.vocabulary))

    def in_pieces(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def logits_of(some: torch.Tensor) -> torch.Tensor:
            return (some @ weight.t()).float()

        scored = Scored(states, labels, torch.zeros_like(labels), 1, logits_of, piece)
        return scored.each(lambda logits, places: token_losses(logits, labels[places])).mean()

    def whole(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy((states @ weight.t()).float(), labels)

    losses: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"pieces": in_pieces, "whole": whole}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError:
        note(liger="not installed")
    else:
        losses["liger"] = lambda states, labels: fused(states, weight, labels)
    exact = states[:256].detach().double().requires_grad_(True)
    oracle = cross_entropy(exact @ weight.t().double(), labels[:256])
    (wanted,) = torch.autograd.grad(oracle, exact)
    for kind, loss in losses.items():
        few = states[:256].detach().requires_grad_(True)
        value = loss(few, labels[:256])
        (gradient,) = torch.autograd.grad(value, few)
        off = (
            abs(value.item() - oracle.item()) / oracle.item(),
            ((gradient.double() - wanted).norm() / wanted.norm()).item(),
        )
        note(**dict(zip((f"{kind}_loss_off", f"{kind}_gradient_off"), off, strict=True)))
        _emptied(size)
        before = torch.cuda.memory_allocated() if size.device == "cuda" else 0
        note(**{f"{kind}_ms": 1000 * _seconds(size, functools.partial(_learned, loss, states, labels))})
        if size.device == "cuda":
            note(**{f"{kind}_gib": (torch.cuda.max_memory_allocated() - before) / GIB})


def _learned(loss: Callable[..., torch.Tensor], states: torch.Tensor, labels: torch.Tensor) -> None:
    torch.autograd.grad(loss(states, labels), states)


PAIRS = (("npo", "lora"), ("graddiff", "lora"), ("simnpo", "lora"), ("finetuning", "lora"), ("graddiff", "full"))


def pairs(size: Size, note: Note, name: str) -> None:
    """Seconds of a step, ours and plain peft in turn on the same batches, as `train.py` makes them: 7 pairs after 2
    that are left out, and the median of their ratios."""
    import train

    train.TOKENS = size.shapes[name][1:]
    for method, way in PAIRS:
        _emptied(size)
        steps = [make(method, way, str(size.work / name), "bfloat16") for make in (train.ours, train.plain)]
        taken = [[train.seconds(step) for step in steps] for _ in range(9)][2:]
        ours, plain = (statistics.median(times) for times in zip(*taken, strict=True))
        ratio = statistics.median(one / other for one, other in taken)
        note(**{f"{method}_{way}_s": ours, f"{method}_{way}_plain_s": plain, f"{method}_{way}_ratio": ratio})
        del steps
        train.OPEN.close()


def counted(size: Size, note: Note, name: str, method: str) -> None:
    """The formula of `counts.py` beside what torch counts in a step. Raises ValueError where they are apart."""
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            _trained(dataclasses.replace(size, steps=steps), name, method, size.shapes[name][1])
        totals.append(counter.get_total_flops())
    tokens = dict.fromkeys(("forget", "retain"), size.shapes[name][1] * size.shapes[name][2])
    stated = operations(method, size.shape(name), tokens, _layer(size.shape(name)))
    ratio = (totals[1] - totals[0]) / stated
    note(counted_over_formula=ratio)
    if not 1 <= ratio < 1.12:  # attention and LoRA's factors are counted, and not in the formula
        raise ValueError("the formula is not what is computed")


def _emptied(size: Size) -> None:
    """Give back what is no longer used, and begin to measure the peak anew."""
    gc.collect()
    if size.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not every sandbox's kernel has it
        Path("/proc/self/clear_refs").write_text("5")


def _peak(size: Size) -> dict[str, float]:
    """The card's peak, its driver's own share included; on a CPU the process's."""
    process = _status("VmHWM")
    if size.device == "cpu":
        return {"peak_gib": process / GIB}
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    return {
        "peak_gib": (torch.cuda.max_memory_reserved() + own) / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "process_gib": process / GIB,
    }


def _status(name: str) -> int:
    """A figure of this process from the kernel, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


# ---- a run, and a merge


class _Clock:
    """A watcher that keeps what each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._title, self._begun = "", 0.0

    def expect(self, stages: object, /) -> None:
        pass

    def step(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def begin(self, title: str) -> None:
        self._title, self._begun = title, time.perf_counter()

    def end(self, outcome: str) -> None:
        self.seconds[self._title] = self.seconds.get(self._title, 0.0) + time.perf_counter() - self._begun


def whole_run(size: Size, note: Note, name: str) -> None:
    """`spunge run`: two parts unlearned by NPO, merged, and every model judged."""
    import spunge

    out, clock = size.work / "run", _Clock()
    recipe = _recipe(
        size,
        name,
        "npo",
        size.shapes[name][1],
        split={"by": "part"},
        evaluate=[
            {"kind": "perplexity", "source": str(size.work / f"{name}-retain.jsonl"), "subject": "retain", "limit": 32}
        ],
    )
    recipe["unlearn"] |= {"steps": max(2, size.steps // 2), "learning_rate": 1e-3}
    _emptied(size)
    started = time.perf_counter()
    try:
        results = spunge.run(recipe, out, clock)
    finally:
        note(stages={title: round(seconds, 2) for title, seconds in clock.seconds.items()})
    note(seconds=time.perf_counter() - started, device=results.device, **_peak(size))
    note(perplexity={stage: results.value(stage, "retain", "perplexity") for stage in results.stages})
    shutil.rmtree(out)


def merging(size: Size, note: Note, name: str) -> None:
    """`spunge merge` of five deltas that change every matrix of the MLPs, by TIES: the first time, and again."""
    from merge import measured

    from spunge.weights.checkpoint import Checkpoint
    from spunge.weights.delta import write_delta

    base = size.work / name
    fingerprint = Checkpoint(base).fingerprint()
    shapes = {key: dimensions for key, dimensions in tensors(size.shape(name)) if ".mlp." in key}
    started = time.perf_counter()
    models = []
    for branch in range(5):
        generator = torch.Generator(size.device).manual_seed(branch)
        changes = {
            key: torch.randn(dimensions, generator=generator, device=size.device).mul_(1e-3)
            for key, dimensions in shapes.items()
        }
        models.append(size.work / f"delta{branch}")
        write_delta(models[-1], changes, {"base": fingerprint})
    note(
        write_seconds=time.perf_counter() - started,
        changed_entries=sum(map(math.prod, shapes.values())),
    )
    out = size.work / "merged"
    given = [word for folder in models for word in ("--model", str(folder))]
    command = [sys.executable, "-m", "spunge", "merge", "--base", str(base), *given, "--out", str(out)]
    nbytes = sum(file.stat().st_size for folder in (base, *models) for file in folder.glob("*.safetensors"))
    for which in ("first", "again"):  # the first compiles
        shutil.rmtree(out, ignore_errors=True)
        run = measured(command)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        note(
            **{
                f"{which}_seconds": run.seconds,
                f"{which}_gb_s": (nbytes + written) / run.seconds / 1e9,
                f"{which}_rss_gib": run.rss / 1024,
                f"{which}_private_gib": run.private / 1024,
            }
        )
    note(files_gb=(nbytes + written) / 1e9)
    for folder in (*models, out):
        shutil.rmtree(folder)


# ---- tests


def tests(size: Size, note: Note) -> None:
    """The unit tests marked `gpu`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--device",
        size.device,
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",  # the project's own name a plug-in that a bare machine lacks
    ]
    own = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(
        [*command, "tests/test_gpu.py"], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(ran.stdout, file=sys.stderr, flush=True)
    lines = ran.stdout.strip().splitlines()
    note(summary=lines[-1] if lines else "", failed=[line for line in lines if line.startswith(("FAILED", "ERROR"))])
    if ran.returncode:
        raise RuntimeError(f"pytest ended with {ran.returncode}; the log has its output")


# ---- all of them

OF_A_MODEL: dict[str, Callable[[Size, Note, str], None]] = {
    "model": model,
    "merge": merging,
    "run": whole_run,
    "forms": forms,
    "head": heads,
    "pairs": pairs,
}


def perform(step: str, size: Size, note: Note) -> None:
    """A step by its name, as check.py lists them."""
    what, _, of = step.partition("-")
    if what in ("card", "tests"):
        (card if what == "card" else tests)(size, note)
    elif what == "count":
        counted(size, note, "1b", of)
    elif what in OF_A_MODEL:
        OF_A_MODEL[what](size, note, of)
    else:
        training(size, note, of, what)
