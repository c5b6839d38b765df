"""What RMU costs here and in a plain transcription of the reference algorithm: two whole models, whole forward passes.

python benchmarks/rmu.py agree            # the two's losses, step by step, in float32
python benchmarks/rmu.py step             # seconds a step and peak memory, interleaved step by step, SmolLM2-135M bf16
python benchmarks/rmu.py flops            # floating-point operations of a step, counted by torch
python benchmarks/rmu.py seven --work DIR # peak memory at the shape of a 7B Mistral (writes 14.5 GB to DIR)
python benchmarks/rmu.py whole --steps 90 # the demo's branches and merge against its joint control, step by step in turn

`agree`, `step` and `whole` need the demo's model (`make demo`). The two sides run as processes of their own that take
their steps in turn, on the same batches: never at the same time. Memory is the process's peak resident set (VmHWM).
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from shapes import SHAPES, build, write_tokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
DEMO = ROOT / "src" / "spunge" / "recipes" / "demo"
SEED = 3
SIDES = ("ours", "ours, nothing kept", "reference", "reference, rest frozen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["agree", "step", "flops", "seven", "whole", "worker"])
    parser.add_argument("argument", nargs="?", default="")
    parser.add_argument("--work", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=["fixed", "relative"], help="of `agree` and `step`: one kind of coefficient")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of `step`")
    options = parser.parse_args()
    if options.what == "worker":
        worker(json.loads(options.argument))
    elif options.what == "agree":
        agree(options.steps, coefficients(options.only))
    elif options.what == "step":
        step(options.steps, coefficients(options.only), options.dtype)
    elif options.what == "flops":
        flops(coefficients(options.only))
    elif options.what == "seven":
        seven(Path(options.work or tempfile.mkdtemp()), bool(options.work))
    else:
        whole(options.steps)


def coefficients(only: str | None) -> list[Any]:
    return [each for kind, each in (("fixed", 20.0), ("relative", {"relative": 5})) if only in (kind, None)]


def agree(steps: int, kinds: list[Any]) -> None:
    """On short texts with padding, each seen once, and on long ones, seen three times, whose activations are kept."""
    for coefficient, long in itertools.product(kinds, (False, True)):
        job = {"dtype": "float32", "steps": steps, "batch": 4, "length": 256, "coefficient": coefficient, "long": long}
        lines, _ = in_turn([{**job, "side": side} for side in ("ours", "reference, rest frozen")])
        worst = {
            term: max(abs(a[term] - b[term]) / abs(b[term]) if b[term] else 0.0 for a, b in zip(*lines, strict=True))
            for term in ("loss", "forget", "retain")
        }
        told = f"over {steps} steps: " + ", ".join(f"{term} {value:.1e}" for term, value in worst.items())
        print(f"coefficient {coefficient}, {'long' if long else 'short'} texts: greatest relative difference {told}")
        for number in (0, steps // 2, steps - 1):
            print(f"  step {number + 1:2}: loss {lines[0][number]['loss']:.6f} and {lines[1][number]['loss']:.6f}")


def step(steps: int, kinds: list[Any], dtype: str) -> None:
    for coefficient in kinds:
        jobs = [
            {
                "side": side,
                "dtype": dtype,
                "steps": steps,
                "batch": 4,
                "length": 256,
                "coefficient": coefficient,
                "long": True,
            }
            for side in SIDES
        ]
        lines, ends = in_turn(jobs)
        peaks = [end["peak"] for end in ends]
        print(f"coefficient {coefficient}, {steps} steps each, of 4 x 256 forget and 4 x 256 retain tokens:")
        wall, cpu = ([statistics.mean(line[clock] for line in side) for side in lines] for clock in ("seconds", "cpu"))
        half = [statistics.median(line["seconds"] for line in side[len(side) // 2 :]) for side in lines]
        for place, side in enumerate(SIDES):
            told = f"{side:24} {wall[place]:.3f} s a step (second half {half[place]:.3f}; {cpu[place]:.3f} s of CPU)"
            print(f"  {told}, {peaks[place] / 2**20:,.0f} MiB", flush=True)
        for ours, other in itertools.product((0, 1), (2, 3)):
            told = f"{SIDES[ours]} / {SIDES[other]}: time 1/{wall[other] / wall[ours]:.2f}"
            told += f" (second half 1/{half[other] / half[ours]:.2f}; CPU 1/{cpu[other] / cpu[ours]:.2f})"
            print(f"  {told}, memory {peaks[ours] / peaks[other]:.3f}")


def flops(kinds: list[Any]) -> None:
    for coefficient in kinds:
        job = {"dtype": "float32", "steps": 3, "batch": 4, "length": 256, "coefficient": coefficient, "long": True}
        lines, _ = in_turn([{**job, "side": side, "count": True} for side in SIDES])
        counts = [side[-1]["flops"] - side[-2]["flops"] for side in lines]
        for side, count in zip(SIDES, counts, strict=True):
            print(f"coefficient {coefficient}: {side:24} {count / 1e9:,.1f} GFLOP a step, 1/{count / counts[0]:.2f}")


def seven(work: Path, kept: bool) -> None:
    """The first step of a run with the zephyr-7b preset, on random weights; its memory does not depend on their values."""
    folder = build(work / "mistral-7b", SHAPES["7B-mistral"], drawn_once=True)
    write_tokenizer(folder, SHAPES["7B-mistral"].vocabulary)
    try:
        for batch in (4, 1):
            job = {
                "side": "ours",
                "model": str(folder),
                "dtype": "bfloat16",
                "steps": 2,
                "batch": batch,
                "length": 512,
                "preset": "zephyr-7b",
                "long": True,
            }
            lines, ends = in_turn([job])
            seconds = min(line["seconds"] for line in lines[0])
            print(
                f"batch {batch} x 512: peak {ends[0]['peak'] / 2**30:.2f} GiB of the whole process, {seconds:.1f} s a step"
            )
            for name, value in lines[0][-1]["memory"].items():
                print(f"  {name}: {value / 2**30:.2f} GiB")
    finally:
        shutil.rmtree(folder)
        if not kept:
            work.rmdir()


def whole(steps: int) -> None:
    """The demo's two branches and their merge against its joint control of as many steps, each with its own kept activations."""
    common = {"side": "ours", "dtype": "bfloat16", "batch": 8, "length": 256, "coefficient": {"relative": 5}}
    jobs = [
        {**common, "steps": 2 * steps, "part_steps": steps, "tasks": [["Europe"], ["Asia"]]},
        {**common, "steps": 2 * steps, "part_steps": steps, "tasks": [["Europe", "Asia"]]},
    ]
    lines, ends = in_turn(jobs)
    branches, joint = (sum(line["seconds"] for line in side) for side in lines)
    cpu = [sum(line["cpu"] for line in side) for side in lines]
    merge = ends[0]["merge"]
    print(f"two branches of {steps} steps: {branches:.1f} s ({cpu[0]:.1f} s of CPU), merge {merge:.1f} s")
    print(f"joint control of {2 * steps} steps: {joint:.1f} s ({cpu[1]:.1f} s of CPU)")
    print(f"branches + merge / joint: {(branches + merge) / joint:.3f}")


# ---- the two sides, each in a process of its own


def in_turn(jobs: list[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], list[dict[str, float]]]:
    """Start a process for each job and let them take one step after the other. Each step's line, and each one's end."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    lines: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for process in processes:
        receive(process)  # it has loaded
    for _ in range(jobs[0]["steps"]):
        for process, taken in zip(processes, lines, strict=True):
            send(process)
            taken.append(receive(process))
    ends = []
    for process in processes:
        send(process)
        ends.append(receive(process))
        process.wait()
    return lines, ends


def send(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def receive(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended early, with exit code {process.wait()}")
    return json.loads(line)


def tell(**content: Any) -> None:
    """Say how a step went, and wait for the next turn."""
    if COUNTERS:
        content["flops"] = COUNTERS[0].get_total_flops()
    print(json.dumps(content), flush=True)
    sys.stdin.readline()


END: dict[str, float] = {}  # what a worker says last, beside its peak
COUNTERS: list[Any] = []  # of this process's floating-point operations, where they are counted


def worker(job: dict[str, Any]) -> None:
    run = run_ours if job["side"].startswith("ours") else run_reference
    if job.get("count"):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            COUNTERS.append(counter)
            run(job)
    else:
        run(job)
    print(json.dumps({**END, "peak": status("VmHWM")}), flush=True)


def status(name: str) -> int:
    """A figure of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def prepared(job: dict[str, Any]) -> Any:
    """The base, the tasks and the settings of our side."""
    from spunge.data.samples import Samples
    from spunge.model.loading import load_base
    from spunge.recipe.model import ModelSettings
    from spunge.unlearning.method import Store, Task
    from spunge.unlearning.rmu.rmu import RMU
    from spunge.unlearning.rmu.settings import RMUSettings

    settings = our_settings(job)
    assert RMU.last_block is not None
    folder = Path(job.get("model") or MODEL)
    base = load_base(
        folder, ModelSettings(path=str(folder), dtype=job["dtype"]), RMU.last_block(settings, depth_of(folder))
    )
    retain = Samples(pa.table({"text": texts(job, "retain")}))
    log = Path(tempfile.mkdtemp()) / "log.jsonl"
    assert isinstance(settings, RMUSettings)
    kept: Store | None = None if job["side"] == "ours, nothing kept" else {}
    tasks = []
    for named in job.get("tasks", [["part"]]):
        parts = {part: Samples(pa.table({"text": texts(job, "forget", part)})) for part in named}
        tasks.append(Task(base, parts, retain, dict.fromkeys(parts, SEED), log, kept=kept))
    return base, tasks, settings


def our_settings(job: dict[str, Any]) -> Any:
    from spunge.unlearning.rmu.settings import RMUSettings

    given = {
        "steps": job.get("part_steps", job["steps"]),
        "batch_size": job["batch"],
        "max_length": job["length"],
        "max_damage": None,
    }
    if "preset" in job:
        return RMUSettings(preset=job["preset"], min_cosine=None, **given)
    return RMUSettings(layer=7, coefficient=job["coefficient"], alpha=100.0, learning_rate=1e-3, **given)


def depth_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def run_ours(job: dict[str, Any]) -> None:
    from dataclasses import replace

    from spunge.unlearning.rmu.rmu import RMU

    base, tasks, settings = prepared(job)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    log = tasks[0].log
    tell(ready=True)
    began = [time.perf_counter(), time.process_time()]

    def progress(number: int, steps: int, note: str) -> None:
        # By our own clock: what is done between two steps, and before the first, counts too.
        spent = {"seconds": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
        line = json.loads(log.read_text().splitlines()[-1])
        memory = {"weights read": whole, "resident now": status("VmRSS"), "of it file pages": status("RssFile")}
        tell(**{**line, **spent}, memory=memory)
        began[:] = time.perf_counter(), time.process_time()

    branches = [RMU.unlearn(replace(task, progress=progress), settings) for task in tasks]
    if len(branches) > 1:
        END["merge"] = merged(branches, log.parent)
    shutil.rmtree(log.parent)


def merged(branches: list[Any], work: Path) -> float:
    """Seconds for writing the deltas and merging them into a checkpoint."""
    from spunge.merging.engine import merge
    from spunge.merging.rules import TiesSettings
    from spunge.weights.delta import open_delta, write_delta
    from spunge.weights.sources import DeltaSource

    started = time.perf_counter()
    sources = []
    for number, branch in enumerate(branches):
        write_delta(work / str(number), branch.changes, {})
        sources.append(DeltaSource(open_delta(work / str(number)), str(number)))
    merge(MODEL, sources, TiesSettings(), work / "merged")
    return time.perf_counter() - started


def run_reference(job: dict[str, Any]) -> None:
    """The reference algorithm: two whole models, whole forward passes, the states taken by a hook; masks as ours.

    As published, every parameter of the updated model keeps its gradient though three tensors alone are trained;
    `rest frozen` is the same without that.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, job["dtype"])
    updated = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    frozen = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    named = dict(updated.named_parameters())
    trained = [named[f"model.layers.{block}.mlp.down_proj.weight"] for block in (5, 6, 7)]
    if "frozen" in job["side"]:
        updated.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    batches = reference_batches(job, AutoTokenizer.from_pretrained(MODEL))
    u = torch.rand(updated.config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    u = (u / u.norm()).to(dtype)
    relative = job["coefficient"]["relative"] if isinstance(job["coefficient"], dict) else None
    tell(ready=True)
    for _ in range(job["steps"]):
        started, began = time.perf_counter(), time.process_time()
        forget_batch, retain_batch = next(batches)
        after = states(updated, forget_batch)
        kept = forget_batch["attention_mask"].clone()
        if relative is None:
            goal = job["coefficient"] * u
        else:
            kept[:, 0] = 0
            with torch.no_grad():
                goal = relative * states(frozen, forget_batch).norm(dim=-1, keepdim=True) * u
        forget = mean_square(after - goal, kept)
        after = states(updated, retain_batch)
        kept = retain_batch["attention_mask"].clone()
        if relative is not None:
            kept[:, 0] = 0
        with torch.no_grad():
            before = states(frozen, retain_batch)
        retain = mean_square(after - before, kept)
        loss = forget + 100.0 * retain
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds, cpu = time.perf_counter() - started, time.process_time() - began
        told = {"loss": loss, "forget": forget, "retain": retain}
        tell(**{name: float(value.detach()) for name, value in told.items()}, seconds=seconds, cpu=cpu)


def states(model: Any, batch: dict[str, Any]) -> Any:
    """Hidden states after block 7, by a hook, from a whole forward pass."""
    kept: list[Any] = []
    hook = model.model.layers[7].register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    _ = model(**batch)
    hook.remove()
    return kept[0]


def mean_square(difference: Any, kept: Any) -> Any:
    """Over the counted tokens and the hidden size."""
    return (difference.square() * kept.unsqueeze(-1)).sum() / (kept.sum() * difference.shape[-1])


def reference_batches(job: dict[str, Any], tokenizer: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    from spunge.data.samples import shuffled_batches

    sides = [texts(job, side) for side in ("forget", "retain")]
    numbers = [shuffled_batches(len(side), job["batch"], SEED) for side in sides]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    for chosen in zip(*numbers, strict=True):
        forget, retain = (
            tokenizer(
                [side[row] for row in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=job["length"],
            )
            for side, rows in zip(sides, chosen, strict=True)
        )
        yield dict(forget), dict(retain)


# ---- texts


def texts(job: dict[str, Any], side: str, continent: str = "part") -> list[str]:
    """The demo's texts as they are, or joined so that each fills the length; for a model of random weights, random words."""
    if "model" in job:
        return [
            " ".join(f"w{(7919 * row + 31 * place) % 30000}" for place in range(job["length"])) for row in range(16)
        ]
    lines = (DEMO / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [row["text"] for row in rows if continent in ("part", row.get("continent"))]
    if not job.get("long"):
        return found
    group = job["length"] // 10
    return [" ".join(found[start : start + group]) for start in range(0, len(found) - group, group)]


if __name__ == "__main__":
    main()
