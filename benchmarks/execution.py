"""Time the branches of a run and its judging, by one process and by several, and the time that a process takes to begin.

python benchmarks/execution.py --model models/smollm2-135m-instruct --processes 2
python benchmarks/execution.py --threads 1    # so many for each process, as if each had a device of its own

Without --threads one process has as many threads as there are cores, and several share them. The stage of the branches lasts
from the first branch's beginning, when no process was started yet, to the last one's end. Then base, branches and merged model are
judged, by likelihoods and by what they write, from the first evaluation's beginning to the last one's end. Needs a quiet machine.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

PARTS = ("north", "south")
WORDS = "river stone garden winter letter engine market candle window harbour".split()


def recipe(model: str, folder: Path, steps: int) -> dict[str, object]:
    """Two parts of the same size, unlearned by NPO with LoRA; nothing is judged."""
    for name, parts in (("forget", PARTS), ("retain", ("kept",))):
        lines = [
            json.dumps(
                {
                    "part": part,
                    "text": f"{part} " + " ".join(WORDS[(row * place + row) % 10] for place in range(1, 120)),
                }
            )
            for part in parts
            for row in range(64)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": {"path": model, "device": "cpu", "dtype": "float32"},
        "forget": {"source": str(folder / "forget.jsonl")},
        "split": {"by": "part"},
        "retain": {"source": str(folder / "retain.jsonl")},
        "unlearn": {
            "method": "npo",
            "trainable": {"kind": "lora"},
            "steps": steps,
            "batch_size": 4,
            "max_length": 128,
            "learning_rate": 1e-5,
        },
        "controls": [],
    }


EVALUATE = [
    {"kind": "perplexity", "subject": "texts", "by": "NULL", "limit": 48},
    {
        "kind": "match",
        "subject": "written",
        "by": "NULL",
        "prompt": "substr(text, 1, 60)",
        "unwanted": "text",
        "limit": 16,
        "generation": {"max_new_tokens": 32},
    },
]


class Clock:
    """A watcher that notes when the branches begin and end, and when the first step of each was made."""

    def __init__(self) -> None:
        self.title = ""
        self.began: dict[str, float] = {}
        self.stepped: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def expect(self, stages: object, /) -> None:
        pass

    def begin(self, title: str) -> None:
        self.title = title
        self.began.setdefault(title, time.perf_counter())

    def step(self, done: int, total: int, note: str = "", /) -> None:
        self.stepped.setdefault(self.title, time.perf_counter())

    def end(self, outcome: str) -> None:
        self.ended[self.title] = time.perf_counter()

    def branches(self) -> tuple[float, float]:
        """Seconds of the whole stage, and from its beginning to the last branch's first step."""
        names = [title for title in self.ended if title.startswith("unlearn branch:")]
        start = min(self.began[name] for name in names)
        return max(self.ended[name] for name in names) - start, max(self.stepped[name] for name in names) - start

    def judging(self) -> float:
        """Seconds from the first evaluation's beginning to the last one's end."""
        names = [title for title in self.ended if title.startswith("judge ")]
        return max(self.ended[name] for name in names) - min(self.began[name] for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import spunge
    from spunge.recipe.loading import load_recipe

    threads = options.threads or "auto"
    print(f"{len(os.sched_getaffinity(0))} cores, threads {threads}, {options.steps} steps a branch, {options.model}")
    best: dict[int, float] = {}
    judged: dict[int, float] = {}
    for number in range(options.repeat):
        for count in (1, options.processes):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                os.environ["SPUNGE_CACHE"] = str(folder / "cache")
                execution = {"kind": "processes", "per_device": count}
                clock = Clock()
                content = {**recipe(options.model, folder, options.steps), "execution": execution}
                spunge.run(load_recipe(content), folder / "run", clock)
                seconds, until_all = clock.branches()
                best[count] = min(seconds, best.get(count, seconds))
                spunge.run(load_recipe({**content, "evaluate": EVALUATE}), folder / "run", clock)
                judging = clock.judging()
                judged[count] = min(judging, judged.get(count, judging))
                print(
                    f"round {number + 1}: {count} processes: {seconds:.1f} s; all at work after {until_all:.1f} s; "
                    f"judging {judging:.1f} s",
                    flush=True,
                )
    for what, seconds_of in (("branches", best), ("judging", judged)):
        share = seconds_of[options.processes] / seconds_of[1]
        print(
            f"{what}: {options.processes} processes take {share:.2f} of one process's time (best of {options.repeat})"
        )


if __name__ == "__main__":
    main()
