"""Speed of judging, against what one would write or install without spunge. In one process, interleaved; medians of rounds.

    python benchmarks/evaluate.py generation    # completions in batches, against `generate` prompt by prompt
    python benchmarks/evaluate.py choices       # multiple choice on PIQA, against lm-evaluation-harness on the same questions

Both sides use one model in memory in float32, and their outcomes are compared: texts that are the same, items that agree.
The harness runs at several batch sizes, and its best one counts. Data lie in ../shared/data; no text is printed.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from spunge.evaluation.choices import Choices, ChoicesSettings
from spunge.evaluation.evaluator import Bench
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.models import Base, load_base
from spunge.recipe import ModelSettings

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
NEW_TOKENS = 30
BATCH_SIZES = (1, 8, 32)  # of the harness


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    with (SHARED / name).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, count)]


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Each side once per round, in turn: seconds of each, and what each gave. The order is reversed every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gave: dict[str, Any] = {}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            gc.collect()
            started = time.perf_counter()
            gave[name] = sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds, gave


def paired(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(mine, other, strict=True)), 3)


def told(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(found), 2) for name, found in seconds.items()}


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

    seconds, gave = interleaved({"plain": lambda: one_by_one(base, prompts), "spunge": batched}, rounds)
    same = sum(a == b for a, b in zip(gave["plain"], gave["spunge"], strict=True))
    return {
        "prompts": count,
        "same texts": same,
        "seconds": told(seconds),
        "spunge over plain": paired(seconds["spunge"], seconds["plain"]),
    }


def harness(base: Base, file: Path, batch_size: int) -> Callable[[], np.ndarray]:
    """A function that runs the harness's own PIQA on a file's rows: (n,) 1 where its `acc` is."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks" / "piqa"))
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "training_split": None,
        "num_fewshot": 0,
    }
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size)

    def run() -> np.ndarray:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            loaded = manager.load([{"group": "local", "task": [{"task": "piqa", **local}]}])
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(0)
            found = lm_eval.evaluate(model, {"tasks": loaded["tasks"]}, bootstrap_iters=0)
        return np.array([sample["acc"] for sample in found["samples"]["piqa"]])

    return run


def choices(base: Base, count: int, rounds: int) -> dict[str, object]:
    rows = rows_of("piqa_validation.jsonl", count)
    items = pa.table(
        {
            "question": [f"Question: {row['goal']}\nAnswer:" for row in rows],
            "choices": [[row["sol1"], row["sol2"]] for row in rows],
            "answer": [row["label"] for row in rows],
        }
    )
    bench = Bench("base", "", Path(), Path())

    def ours() -> np.ndarray:
        return Choices.measure(base, ChoicesSettings(normalize="none"), items, bench)[0].numerator

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "piqa.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sides: dict[str, Callable[[], Any]] = {f"harness, {size}": harness(base, file, size) for size in BATCH_SIZES}
        sides["spunge"] = ours
        for run in sides.values():  # the harness loads its data once, then from its cache
            run()
        seconds, gave = interleaved(sides, rounds)
    best = min((name for name in sides if name != "spunge"), key=lambda name: statistics.median(seconds[name]))
    return {
        "questions": count,
        "accuracy": {name: float(found.mean()) for name, found in gave.items()},
        "items that agree": int((gave["spunge"] == gave[best]).sum()),
        "seconds": told(seconds),
        f"spunge over {best}": paired(seconds["spunge"], seconds[best]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["generation", "choices"], help="generation, choices")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="prompts or questions (64 prompts, 200 questions)")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    given = parser.parse_args()
    base = load_base(given.model, ModelSettings(path=str(given.model), dtype="float32", device="cpu"))
    content: dict[str, object] = {"threads": torch.get_num_threads()}
    for name, run, count in (("generation", generation, 64), ("choices", choices, 200)):
        if name in given.what:
            content[name] = run(base, given.count or count, given.rounds)
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
