"""What the attention of `model/attention.py` saves end to end: CPU time of a step with torch's sdpa over that with ours.

    python benchmarks/attention.py --model models/smollm2-135m-instruct --shapes 128x4 256x4 512x2

One process, one thread, both in turn; the fastest of the steps is taken, then the median over the repetitions.
"""

import argparse
import random
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import torch

from spunge.data.samples import Samples, encode
from spunge.evaluation.likelihood import likelihoods
from spunge.model.loading import Base, load_base
from spunge.progress import SILENT
from spunge.recipe.schema import ModelSettings
from spunge.registry import METHODS
from spunge.unlearning.method import Task

WORDS = "the quick brown fox jumps over a lazy dog and then the river bends around old stones".split()
METHOD = {"npo": {}, "graddiff": {"trainable": {"kind": "all"}}, "rmu": {"layer": 7}}


def samples(words: int, seed: int) -> Samples:
    draw = random.Random(seed)
    return Samples(pa.table({"text": [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(32)]}))


def seconds(base: Base, forget: Samples, retain: Samples, length: int, size: int, what: str) -> float:
    """CPU time of a method's fastest step, or of judging 16 texts."""
    if what == "judging":
        coded = [encode(text, base.tokenizer, length) for text in forget.texts(range(16), base.tokenizer)]
        start = time.process_time()
        likelihoods(base, coded, SILENT.step)
        return time.process_time() - start
    ends: list[float] = []
    method = METHODS.get(what)
    given = {"method": what, "batch_size": size, "max_length": length, "steps": 3, **METHOD[what]}
    task = Task(base, {"a": forget}, retain, {"a": 1}, progress=lambda *_: ends.append(time.process_time()))
    method.unlearn(task, method.settings.model_validate(given))
    return min(after - before for before, after in pairwise(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shapes", nargs="+", default=["128x4", "256x4", "512x2"], help="tokens x batch size")
    parser.add_argument("--repetitions", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = ModelSettings(path=options.model, dtype="bfloat16", device="cpu")
    base = load_base(Path(options.model).resolve(), settings)
    ours = base.model.config._attn_implementation

    for shape in options.shapes:
        length, size = (int(number) for number in shape.split("x"))
        timed = partial(seconds, base, samples(length * 2, 0), samples(length * 2, 1), length, size)
        for what in [*METHOD, "judging"]:
            ratios = []
            for repetition in range(options.repetitions):
                took = {}
                for kind in ("sdpa", ours)[:: 1 if repetition % 2 else -1]:
                    base.model.config._attn_implementation = kind
                    took[kind] = timed(what)
                ratios.append(took["sdpa"] / took[ours])
            print(f"{shape} {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
