"""Speed of judging, against what one would write or install without spunge. In one process, interleaved; medians of rounds.

    python benchmarks/evaluate.py generation    # completions in batches, against `generate` prompt by prompt
    python benchmarks/evaluate.py piqa arc      # multiple choice, against lm-evaluation-harness on the same questions

Both sides use one model in memory (in float32, or as --dtype says), and their outcomes are compared: texts that are the same,
items that agree.
The harness runs at several batch sizes, and its best one counts. PIQA has two long candidates after a short prompt, ARC-Easy
four short ones after a longer: how much they share decides. Data lie in ../shared/data; no text is printed.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from spunge.evaluation.choices import CHOICES, ChoicesSettings
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.model.loading import Base, load_base
from spunge.recipe.model import ModelSettings

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
NEW_TOKENS = 30
BATCH_SIZES = (8, 32)  # of the harness; at 1 it is slower on either task


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    with (SHARED / name).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, count)]


class Taken(NamedTuple):
    seconds: float
    cpu: float  # seconds of processor time, which other work on the machine disturbs less


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[Taken]], dict[str, Any]]:
    """Each side once per round, in turn: what it took and what it gave. The order is reversed every other round."""
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    gave: dict[str, Any] = {}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            gc.collect()
            started = time.perf_counter(), time.process_time()
            gave[name] = sides[name]()
            taken[name].append(Taken(time.perf_counter() - started[0], time.process_time() - started[1]))
            print(f"round {number + 1} {name:12} {taken[name][-1]}", file=sys.stderr, flush=True)
    return taken, gave


def best(taken: dict[str, list[Taken]], names: Sequence[str]) -> str:
    """The one that took the least processor time."""
    return min(names, key=lambda name: statistics.median(each.cpu for each in taken[name]))


def compared(taken: dict[str, list[Taken]], other: str) -> dict[str, object]:
    """Medians, and the medians of the rounds' ratios."""
    pairs = list(zip(taken["spunge"], taken[other], strict=True))
    return {
        "seconds": {name: round(statistics.median(each.seconds for each in found), 2) for name, found in taken.items()},
        f"spunge over {other}": round(statistics.median(mine.seconds / its.seconds for mine, its in pairs), 3),
        f"spunge over {other}, processor time": round(statistics.median(mine.cpu / its.cpu for mine, its in pairs), 3),
    }


def one_by_one(base: Base, prompts: Sequence[str]) -> list[str]:
    """Greedy completions as one would write them down: a prompt, a call."""
    found = []
    for prompt in prompts:
        ids = base.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            written = base.model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found.append(base.tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def generation(base: Base, count: int, rounds: int) -> dict[str, object]:
    prompts = [row["text"] for row in rows_of("toxigen_human.jsonl", count)]

    def batched() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench("base", "", Path(folder), Path(folder))
            found = completions(base, prompts, GenerationSettings(max_new_tokens=NEW_TOKENS), bench)
            return [texts[0] for texts in found]

    taken, gave = interleaved({"plain": lambda: one_by_one(base, prompts), "spunge": batched}, rounds)
    same = sum(a == b for a, b in zip(gave["plain"], gave["spunge"], strict=True))
    return {"prompts": count, "same texts": same, **compared(taken, "plain")}


class Task(NamedTuple):
    """A task of the harness, where its questions are, and how they look to our evaluator."""

    name: str
    folder: str
    file: str
    question: Callable[[dict[str, Any]], dict[str, Any]]


TASKS = {
    "piqa": Task(
        "piqa",
        "piqa",
        "piqa_validation.jsonl",
        lambda row: {
            "question": f"Question: {row['goal']}\nAnswer:",
            "choices": [row["sol1"], row["sol2"]],
            "answer": row["label"],
        },
    ),
    "arc": Task(
        "arc_easy",
        "arc",
        "arc_easy_test.jsonl",
        lambda row: {
            "question": f"Question: {row['question']}\nAnswer:",
            "choices": row["choices"]["text"],
            "answer": row["choices"]["label"].index(row["answerKey"]),
        },
    ),
}


def harness(base: Base, task: Task, file: Path, batch_size: int) -> Callable[[], np.ndarray]:
    """A function that runs the harness's own task on a file's rows: (n,) 1 where its `acc` is."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks" / task.folder)
    )
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "num_fewshot": 0,
    }
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size)

    def load() -> dict[str, Any]:
        loaded: dict[str, Any] = manager.load([{"group": "local", "task": [{"task": task.name, **local}]}])["tasks"]
        for each in loaded.values():
            each.set_fewshot_seed(0)
        return loaded

    def run() -> np.ndarray:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = lm_eval.evaluate(model, {"tasks": load()}, bootstrap_iters=0)
        return np.array([sample["acc"] for sample in found["samples"][task.name]])

    load()  # it reads its data once, then from its cache
    return run


def choices(base: Base, task: Task, count: int, rounds: int) -> dict[str, object]:
    rows = rows_of(task.file, count)
    items = pa.Table.from_pylist([task.question(row) for row in rows])
    bench = Bench("base", "", Path(), Path())

    def ours() -> np.ndarray:
        return CHOICES.measure(base, ChoicesSettings(normalize="none"), items, bench)[0].numerator

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sides: dict[str, Callable[[], Any]] = {f"harness, {n}": harness(base, task, file, n) for n in BATCH_SIZES}
        taken, gave = interleaved({**sides, "spunge": ours}, rounds)
    other = best(taken, list(sides))
    return {
        "questions": count,
        "accuracy": {name: float(found.mean()) for name, found in gave.items()},
        "items that agree": int((gave["spunge"] == gave[other]).sum()),
        **compared(taken, other),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["generation", *TASKS], help="generation, piqa, arc")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="prompts or questions (64 prompts, 200 questions)")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "auto"], default="float32")
    given = parser.parse_args()
    base = load_base(given.model, ModelSettings(path=str(given.model), dtype=given.dtype, device="cpu"))
    content: dict[str, object] = {"threads": torch.get_num_threads(), "dtype": str(base.dtype)}
    for name in given.what:
        if name == "generation":
            content[name] = generation(base, given.count or 64, given.rounds)
        else:
            content[name] = choices(base, TASKS[name], given.count or 200, given.rounds)
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
