"""Train a model by one process and by several together: the losses, the delta, and what each process holds.

python benchmarks/sharded.py --model models/smollm2-135m-instruct --processes 1 2

Held are the tensors between two steps: weights, the base's values beside what is trained in full, and the optimizer's moments.
Gradients are as large as what is trained. The peak is of the process from its first step on, with Python and its libraries.
"""

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import torch
from torch import Tensor

from spunge.data.samples import Samples
from spunge.model.loading import load_base
from spunge.model.memory import peak_memory
from spunge.model.ranks import ALONE, Ranks, Seat, seated
from spunge.recipe.model import ModelSettings
from spunge.registry import METHODS
from spunge.unlearning.method import Task

WORDS = "river stone garden winter letter engine market candle window harbour".split()
LORA = {"kind": "lora", "rank": 16, "dropout": 0.0, "targets": "all-linear"}
TRAININGS: Mapping[str, dict[str, Any]] = {
    "npo, LoRA": {"method": "npo", "trainable": LORA, "learning_rate": 1e-4},
    "ga, full": {"method": "ga", "trainable": {"kind": "all"}, "learning_rate": 1e-5},
}


def samples(seed: int, count: int = 32) -> Samples:
    texts = [
        " ".join(WORDS[(row * place + seed + row) % 10] for place in range(1, 20 + row % 40)) for row in range(count)
    ]
    return Samples(pa.table({"text": texts}))


def held() -> int:
    """Bytes of all tensors of this process."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def trained(ranks: Ranks, model: Path, dtype: str, steps: int, training: Mapping[str, Any], folder: Path) -> None:
    """Train, and leave the losses, the delta and what was held in a folder."""
    base = load_base(model, ModelSettings(path=str(model), dtype=dtype, device="cpu"), ranks=ranks)
    most: list[int] = []

    def look(done: int, _total: int, _note: str = "") -> None:
        gc.collect()
        most.append(held())
        if done == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    log = folder / "log.jsonl" if ranks.main else None
    task = Task(base, {"a": samples(1)}, samples(2), {"a": 7}, log=log, progress=look)
    settings = {"steps": steps, "batch_size": 4, "max_length": 64, "max_damage": None, **training}
    method = METHODS.get(training["method"])
    branch = method.unlearn(task, method.settings(**settings))
    told = {"held": max(most), "peak": peak_memory()}
    (folder / f"held-{ranks.rank}.json").write_text(json.dumps(told))
    if ranks.main:
        changes = {name: each if isinstance(each, Tensor) else each.dense() for name, each in branch.changes.items()}
        torch.save(changes, folder / "delta.pt")


def member(seat: Seat, *about: Any) -> None:
    if seat.ranks == 1:
        trained(ALONE, *about)
        return
    with seated(seat) as ranks:
        trained(ranks, *about)


def run(count: int, model: Path, dtype: str, steps: int, training: Mapping[str, Any], folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    folder.mkdir()
    seats = [Seat(rank, count, folder / "meeting") for rank in range(count)]
    members = [context.Process(target=member, args=(seat, model, dtype, steps, training, folder)) for seat in seats]
    for each in members:
        each.start()
    for each in members:
        each.join()
        assert each.exitcode == 0


def norm(changes: Mapping[str, Tensor]) -> float:
    return float(torch.stack([each.double().norm() for each in changes.values()]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    for dtype in options.dtype:
        for name, training in TRAININGS.items():
            first: dict[str, Tensor] = {}
            for count in options.processes:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    run(count, options.model, dtype, options.steps, training, out)
                    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
                    told = [json.loads((out / f"held-{rank}.json").read_text()) for rank in range(count)]
                    delta = torch.load(out / "delta.pt")
                first = first or delta
                apart = {each: delta[each] - first[each] for each in first}
                print(
                    f"{dtype} {name}, {count} processes: losses {' '.join(f'{loss:.6f}' for loss in losses)}; delta: largest "
                    f"entry {max(float(each.abs().max()) for each in delta.values()):.2g}, apart by at most "
                    f"{max(float(each.abs().max()) for each in apart.values()):.2g}, norm of the difference over the norm "
                    f"{norm(apart) / norm(first):.2g}; MiB of each process: held {[each['held'] >> 20 for each in told]}, peak "
                    f"{[each['peak'] >> 20 for each in told]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
