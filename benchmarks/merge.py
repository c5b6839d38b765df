"""Speed and memory of `spunge merge`: against mergekit, against `cp -r`, and as models grow. Whole processes, interleaved.

    python benchmarks/merge.py mergekit --peer /path/to/mergekit-yaml   # 0.5B x 5 full checkpoints, ties, density 0.2
    python benchmarks/merge.py deltas                                   # five RMU-like deltas into a 7B-shaped base
    python benchmarks/merge.py growth                                   # 0.1B, 0.5B, 2B
    python benchmarks/merge.py holes                                    # five LoRA deltas into a 70B-shaped base of zeros

Inputs are random weights of real shapes under --work (mergekit: 6 GB, deltas: 30 GB, growth: 30 GB); --keep leaves them
there. Memory is the peak of the whole process: `private` counts its own pages, `rss` also mapped pages of the inputs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from shapes import SHAPES, Shape, build, config, tensors

DENSITY = 0.2
FLOOR = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
*inputs, out = sys.argv[1:]
def read(file):
    buffer = bytearray(1 << 22)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer): pass
def write(file):
    piece = bytes(1 << 22)
    with open(out, "wb", buffering=0) as stream:
        left = os.path.getsize(file)
        while left > 0: left -= stream.write(piece[:left])
with ThreadPoolExecutor(2) as pool:
    list(pool.map(read, inputs))
    list(pool.map(write, inputs[:1]))
"""


class Run(NamedTuple):
    seconds: float
    cpu: float  # seconds of processor time, which other work on the machine disturbs less
    private: float  # MiB
    rss: float  # MiB


def measured(command: Sequence[str]) -> Run:
    """Run a command to its end; raises where it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks = [0.0, 0.0]
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.2):
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            except OSError:
                return
            sizes = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines}
            peaks[0] = max(peaks[0], sizes["Private_Dirty:"] + sizes.get("Shared_Dirty:", 0))
            peaks[1] = max(peaks[1], sizes["Rss:"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.stderr.read() if process.stderr else ""
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    stopped.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, *peaks)


def interleaved(commands: dict[str, Sequence[str]], outs: dict[str, Path], rounds: int) -> dict[str, list[Run]]:
    """Each command once per round, its output removed before."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            runs[name].append(measured(command))
            print(f"round {number + 1} {name:22} {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def spunge(base: Path, models: Sequence[Path], out: Path, scope: str, *more: str) -> list[str]:
    given = [word for model in models for word in ("--model", str(model))]
    settings = ["--density", str(DENSITY), "--scope", scope, "--out", str(out), *more]
    return [sys.executable, "-m", "spunge", "merge", "--base", str(base), *given, *settings]


def report(runs: dict[str, list[Run]], against: str) -> dict[str, object]:
    """Medians, and the median of the paired ratios to one of the commands."""
    content: dict[str, object] = {}
    for name, found in runs.items():
        ratios = [mine.seconds / other.seconds for mine, other in zip(found, runs[against], strict=True)]
        content[name] = {
            "seconds": round(statistics.median(run.seconds for run in found), 2),
            "cpu_seconds": round(statistics.median(run.cpu for run in found), 2),
            "private_mib": round(statistics.median(run.private for run in found)),
            "rss_mib": round(statistics.median(run.rss for run in found)),
            f"seconds over {against}, paired": round(statistics.median(ratios), 3),
            "runs": [round(run.seconds, 2) for run in found],
        }
    return content


def against_mergekit(work: Path, peer: str, rounds: int, dtype: str) -> dict[str, object]:
    base = build(work / "0.5B" / "base", SHAPES["0.5B"])
    models = [build(work / "0.5B" / f"copy{i}", SHAPES["0.5B"], i) for i in range(1, 6)]
    entries = [{"model": str(model), "parameters": {"weight": 1.0, "density": DENSITY}} for model in models]
    file = work / "mergekit.yaml"
    types = {"dtype": dtype, "out_dtype": "bfloat16"}
    file.write_text(json.dumps({"merge_method": "ties", "base_model": str(base), "models": entries, **types}))
    outs = {name: work / f"out-{name}" for name in ("tensor", "model", "mergekit")}
    inputs = [str(folder / "model.safetensors") for folder in (base, *models)]
    commands: dict[str, Sequence[str]] = {
        "floor": [sys.executable, "-c", FLOOR, *inputs, str(work / "floor.bin")],
        "tensor": spunge(base, models, outs["tensor"], "tensor"),
        "model": spunge(base, models, outs["model"], "model"),
    }
    if peer:
        commands["mergekit"] = [peer, str(file), str(outs["mergekit"])]
    subprocess.run(["sync"], check=True)  # pages of fresh inputs that are not on the disk yet would count as private
    measured(commands["floor"])  # warm
    runs = interleaved(commands, {**outs, "floor": work / "floor.bin"}, rounds)
    content = report(runs, "mergekit" if peer else "floor")
    tensor, floor = runs["tensor"], runs["floor"]
    content["tensor over floor"] = _paired(tensor, floor)
    content["model over tensor"] = _paired(runs["model"], tensor)
    if peer:
        content["mergekit over tensor"] = _paired(runs["mergekit"], tensor)
        ratios = [theirs.cpu / ours.cpu for theirs, ours in zip(runs["mergekit"], tensor, strict=True)]
        content["mergekit over tensor, processor time"] = round(statistics.median(ratios), 2)
        content["mergekit's private memory over tensor's"] = round(
            statistics.median(a.private / b.private for a, b in zip(runs["mergekit"], tensor, strict=True)), 2
        )
        content["entries that differ"] = differing(base, models, outs["tensor"], outs["mergekit"])
    return content


def _paired(mine: list[Run], other: list[Run]) -> float:
    return round(statistics.median(a.seconds / b.seconds for a, b in zip(mine, other, strict=True)), 2)


def differing(base: Path, models: Sequence[Path], ours: Path, theirs: Path) -> dict[str, float]:
    """Share of the output's entries that differ, and of those, the share at some model's threshold (a tie)."""
    from spunge.weights.checkpoint import Checkpoint

    total = count = tied = 0
    folders = [Checkpoint(folder) for folder in (base, *models, ours, theirs)]
    for name in folders[0].tensors:
        plain, *copies, a, b = (folder.read(name).flatten().float() for folder in folders)
        apart = (a != b).nonzero().flatten()
        at_threshold = torch.zeros(apart.numel(), dtype=torch.bool)
        for copy in copies:
            size = (copy - plain).abs()
            threshold = size.kthvalue(size.numel() - max(1, int(DENSITY * size.numel())) + 1).values
            at_threshold |= size[apart] == threshold
        total, count, tied = total + a.numel(), count + apart.numel(), tied + int(at_threshold.sum())
    return {"share": count / total, "of those at a threshold": tied / max(1, count)}


def deltas_into_7b(work: Path, rounds: int) -> dict[str, object]:
    """RMU changes down_proj of three blocks: 3 x 45 million entries per branch."""
    from spunge.weights.checkpoint import Checkpoint
    from spunge.weights.delta import write_delta

    base = build(work / "7B" / "base", SHAPES["7B"])
    begun = time.perf_counter()
    fingerprint = Checkpoint(base).fingerprint()
    hashing = time.perf_counter() - begun
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (5, 6, 7)]
    shapes = dict(tensors(SHAPES["7B"]))
    models = []
    for branch in range(5):
        folder = work / "7B" / f"delta{branch}"
        if not folder.exists():
            generator = torch.Generator().manual_seed(branch)
            changes = {name: torch.randn(shapes[name], generator=generator).mul_(2.5e-4) for name in names}
            write_delta(folder, changes, {"base": fingerprint})
        models.append(folder)
    outs = {"cp -r": work / "7B" / "copy", "spunge": work / "7B" / "out"}
    commands = {
        "cp -r": ["cp", "-r", str(base), str(outs["cp -r"])],
        "spunge": spunge(base, models, outs["spunge"], "changed"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in sorted(commands, reverse=bool(number % 2)):
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            runs[name].append(measured(commands[name]))
            print(f"round {number + 1} {name:10} {runs[name][-1]}", file=sys.stderr, flush=True)
    return {**report(runs, "cp -r"), "hashing the base once, seconds": round(hashing, 1)}


def growth(work: Path, rounds: int) -> dict[str, object]:
    """Two models, scope tensor, at three sizes: seconds per billion entries read, and memory."""
    content: dict[str, object] = {}
    for size in ("0.1B", "0.5B", "2B"):
        shape = SHAPES[size]
        base = build(work / size / "base", shape)
        models = [build(work / size / f"copy{i}", shape, i) for i in (1, 2)]
        out = work / size / "out"
        subprocess.run(["sync"], check=True)
        runs = interleaved({size: spunge(base, models, out, "tensor")}, {size: out}, rounds)[size]
        entries = sum(torch.Size(dimensions).numel() for _name, dimensions in tensors(shape))
        seconds = statistics.median(run.seconds for run in runs)
        content[size] = {
            "parameters": entries,
            "seconds": round(seconds, 2),
            "private_mib": round(statistics.median(run.private for run in runs)),
        }
        shutil.rmtree(out, ignore_errors=True)
    return content


def deltas_into_70b(work: Path, rounds: int) -> dict[str, object]:
    """LoRA factors on down_proj of three blocks, into a base whose files are one hole each: what is copied takes no room."""
    from spunge.weights.checkpoint import Checkpoint
    from spunge.weights.delta import LowRank, write_delta

    shape, base = SHAPES["70B"], work / "70B" / "base"
    holes(base, shape)
    begun = time.perf_counter()
    fingerprint = Checkpoint(base).fingerprint()
    hashing = time.perf_counter() - begun
    shapes = dict(tensors(shape))
    models = []
    for branch in range(5):
        models.append(folder := work / "70B" / f"delta{branch}")
        if folder.exists():
            continue
        generator = torch.Generator().manual_seed(branch)
        changes = {}
        for layer in (5, 6, 7):
            rows, columns = shapes[name := f"model.layers.{layer}.mlp.down_proj.weight"]
            A, B = (torch.randn(size, generator=generator).mul_(0.01) for size in ((16, columns), (rows, 16)))
            changes[name] = LowRank(A, B, 1.0)
        write_delta(folder, changes, {"base": fingerprint})
    out = work / "70B" / "out"
    runs = interleaved({"spunge": spunge(base, models, out, "changed")}, {"spunge": out}, rounds)
    content = report(runs, "spunge")
    for name, folder in (("base", base), ("merged", out)):
        files = [file.stat() for file in folder.glob("*.safetensors")]
        content[f"{name}, GB"] = round(sum(file.st_size for file in files) / 1e9, 1)
        content[f"{name}, GB of disk"] = round(sum(file.st_blocks * 512 for file in files) / 1e9, 2)
    return {**content, "hashing the base once, seconds": round(hashing, 1)}


def holes(folder: Path, shape: Shape) -> None:
    """A bf16 checkpoint of zeros, in a shard for each block, that takes no room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, dimensions in tensors(shape):
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append((name, dimensions))
    index = {}
    for number, held in enumerate(shards.values(), 1):
        file, header, at = f"model-{number:05}-of-{len(shards):05}.safetensors", {}, 0
        for name, dimensions in held:
            end = at + 2 * torch.Size(dimensions).numel()
            header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [at, end]}
            index[name], at = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config(shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mergekit", "deltas", "growth", "holes"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/merge-bench"))
    parser.add_argument("--peer", default="", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--dtype", default="bfloat16", help="mergekit's arithmetic")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.what == "mergekit":
        content = against_mergekit(given.work, given.peer, given.rounds, given.dtype)
    elif given.what == "deltas":
        content = deltas_into_7b(given.work, given.rounds)
    elif given.what == "growth":
        content = growth(given.work, given.rounds)
    else:
        content = deltas_into_70b(given.work, given.rounds)
    print(json.dumps(content, indent=2))
    if not given.keep:
        shutil.rmtree(given.work)


if __name__ == "__main__":
    main()
