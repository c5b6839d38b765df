"""What a stage takes beyond its own work: N tiny stages made here, by a process beside, and by an actor of a local Ray cluster.

    python benchmarks/overhead.py                    # 8 branches of a random model with 2 layers, one at a time
    python benchmarks/overhead.py --stages 20

A first run warms each command's own libraries. Then: seconds until the first branch is made, in which a process or an actor begins
and imports its libraries, and seconds for each of the others; and for each kind, how much more a stage takes than here, with the
first one's beginning shared out over all (mean), and without (later).
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
KINDS = ("here", "processes", "ray")


def write_model(folder: Path) -> None:
    """A Llama of 2 layers with random weights, and a tokenizer of single words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **{f"w{n}": n + 2 for n in range(62)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def recipe(folder: Path, stages: int, kind: str) -> dict[str, Any]:
    rows = [{"part": f"p{n % stages}", "text": f"w{n % 60} w{n % 7} w{n % 11} w3"} for n in range(4 * stages)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(folder / "model"), "device": "cpu", "dtype": "float32"},
        "forget": {"source": str(folder / "rows.jsonl")},
        "split": {"by": "part"},
        "unlearn": {"method": "ga", "steps": 1, "batch_size": 2, "max_damage": None},
        "controls": [],
        "execution": {"kind": kind, **({"per_device": 1} if kind == "processes" else {})},
    }


class Clock:
    """A watcher that notes when each branch was made."""

    def __init__(self) -> None:
        self.title = ""
        self.ended: list[float] = []

    def expect(self, stages: object, /) -> None:
        pass

    def begin(self, title: str) -> None:
        self.title = title

    def step(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def end(self, outcome: str) -> None:
        if self.title.startswith("unlearn branch:"):
            self.ended.append(time.perf_counter())


def measure(kind: str, stages: int) -> None:
    import spunge
    from spunge.recipe.loading import load_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SPUNGE_CACHE"] = str(folder / "cache")
        write_model(folder / "model")
        spunge.run(load_recipe(recipe(folder, 1, "here")), folder / "warm")
        if kind == "ray":
            import ray

            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        clock, asked = Clock(), load_recipe(recipe(folder, stages, kind))
        began = time.perf_counter()
        spunge.run(asked, folder / "run", clock)
        whole, first = time.perf_counter() - began, clock.ended[0] - began
        later = (clock.ended[-1] - clock.ended[0]) / (stages - 1)
        print(json.dumps({"whole": whole, "first": first, "later": later}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure, asked.stages)
        return
    print("| made by | first, s | each later one, s | whole run, s | more a stage: mean, s | later, s |")
    print("|---|---|---|---|---|---|")
    here: dict[str, float] = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--measure", kind, "--stages", str(asked.stages)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(ended.stdout.splitlines()[-1])
        here = here or told
        mean, later = (told["whole"] - here["whole"]) / asked.stages, told["later"] - here["later"]
        print(
            f"| {kind} | {told['first']:.1f} | {told['later']:.2f} | {told['whole']:.1f} | {mean:.2f} | {later:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
