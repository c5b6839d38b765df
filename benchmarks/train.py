"""What a training step costs: ours beside plain transformers + peft, and beside plain ones compiled, in turn.

    OMP_NUM_THREADS=1 python benchmarks/train.py                       # writes the table into docs/benchmarks/training.md
    OMP_NUM_THREADS=1 python benchmarks/train.py --dtype float32       # the page's other table: CPUs without bfloat16 arithmetic
    python benchmarks/train.py --methods npo --ways lora --compiled    # some of them, and torch.compile beside

Every pair of steps is of the same batches, 4 x 256 random tokens that are all scored, ours and plain in turn, so that what else
the machine does meets both; the ratio is the median of the pairs'. Times are processor seconds on a CPU and seconds on a GPU.
Plain is what one would write: LoRA as peft makes it beside a base in --dtype (r = 16 on every linear layer, no dropout), or
float32 weights (under autocast for bfloat16), losses of whole logits, the reference with the adapter switched off at each step.
Full fine-tuning takes the methods without a reference, which plainly would need a second model. Peak memory is that of a process
of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "training.md"
START = {
    "bfloat16": "<!-- table: python benchmarks/train.py -->",
    "float32": "<!-- table: python benchmarks/train.py --dtype float32 -->",
}
END = "<!-- end of table -->"
CASES = {"lora": ("finetuning", "graddiff", "npo", "simnpo"), "full": ("finetuning", "graddiff", "simnpo")}
TOKENS = (4, 256)
RATE = 1e-5

OPEN = ExitStack()  # what a step needs open until the process ends

Step = Callable[[], None]


def batches(vocabulary: int) -> list[Tensor]:
    """A forget and a retain batch."""
    drawn = torch.randint(10, vocabulary - 10, (2, *TOKENS), generator=torch.Generator().manual_seed(0))
    return [drawn[0], drawn[1]]


def ours(method: str, way: str, model: str, dtype: str) -> Step:
    """A step as the product's loop makes it."""
    from spunge.data.samples import Encoded, collate
    from spunge.model.loading import load_base
    from spunge.recipe.model import ModelSettings
    from spunge.recipe.training import Everything, LoRA
    from spunge.unlearning.npo import negative_preference
    from spunge.unlearning.optimizers import optimizer_of
    from spunge.unlearning.outputs import OutputSettings
    from spunge.unlearning.reference import base_outputs
    from spunge.unlearning.scored import outputs
    from spunge.unlearning.trained import training, training_mode

    base = load_base(Path(model), ModelSettings(path=model, dtype=dtype))
    forget, retain = (
        collate([Encoded(row, list(row)) for row in ids.tolist()], base.device)
        for ids in batches(base.model.config.vocab_size)
    )
    what = LoRA(dropout=0.0, targets="all-linear") if way == "lora" else Everything()
    trained = OPEN.enter_context(training(base, what, 0))
    OPEN.enter_context(training_mode(trained.model))
    optimizer = optimizer_of(trained.parameters, OutputSettings(method=method, learning_rate=RATE), "unlearn")
    with base.autocast():
        reference = base_outputs(trained, forget).sums() if method == "npo" else None  # once: other epochs have it

    def terms() -> list[Callable[[], Tensor]]:
        def forgotten() -> Tensor:
            scored = outputs(trained.model, forget)
            if reference is not None:
                return negative_preference(scored.sums(), reference, 0.1)
            if method == "simnpo":
                return -(2 / 4.5) * logsigmoid(4.5 * scored.sums() / scored.lengths()).mean()
            return -scored.mean()

        kept = [lambda: outputs(trained.model, retain).mean()]
        return kept if method == "finetuning" else [forgotten, *kept]

    def step() -> None:
        for term in terms():
            with base.autocast():
                loss = term()
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(method: str, way: str, model: str, dtype: str, compiled: bool = False) -> Step:
    """The same step with transformers and peft alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = dtype if way == "lora" else "float32"
    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=stored).to(device)
    if way == "lora":
        config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        net = get_peft_model(net, config)
    net.train()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    forget, retain = (ids.to(device) for ids in batches(net.config.vocab_size))
    call = torch.compile(net) if compiled else net

    def losses(ids: Tensor) -> Tensor:  # (b, t - 1)
        logits = call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    def loss() -> Tensor:
        if method == "finetuning":
            return losses(retain).mean()
        each = losses(forget)
        if method == "npo":
            with torch.no_grad(), net.disable_adapter():
                reference = losses(forget).sum(1)
            forgotten = -(2 / 0.1) * logsigmoid(0.1 * (each.sum(1) - reference)).mean()
        elif method == "simnpo":
            forgotten = -(2 / 4.5) * logsigmoid(4.5 * each.mean(1)).mean()
        else:
            forgotten = -each.mean()
        return forgotten + losses(retain).mean()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=way == "full" and dtype == "bfloat16"):
            total = loss()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS: dict[str, Callable[[str, str, str, str], Step]] = {
    "ours": ours,
    "plain": plain,
    "compiled": partial(plain, compiled=True),
}


def seconds(step: Step) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    step()
    return time.process_time() - started


def peak(kind: str, method: str, way: str, model: str, dtype: str) -> int:
    """Bytes that two steps take at the most, in a process of its own."""
    command = [sys.executable, __file__, "--peak", kind, "--methods", method, "--ways", way, "--model", model]
    command += ["--dtype", dtype]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def measured(kinds: list[str], method: str, way: str, model: str, dtype: str, pairs: int) -> str:
    """A line of the table."""
    steps = {kind: KINDS[kind](method, way, model, dtype) for kind in kinds}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for pair in range(pairs + 1):
        for kind, step in steps.items():
            spent = seconds(step)
            if pair:  # the first is to warm up
                taken[kind].append(spent)
    cells = [f"{statistics.median(taken[kind]):.2f} s" for kind in kinds]
    for kind in kinds[1:]:
        ratio = statistics.median(a / b for a, b in zip(taken["ours"], taken[kind], strict=True))
        cells.append(f"**{ratio:.2f}**")
    memory = [peak(kind, method, way, model, dtype) / 2**30 for kind in kinds]
    cells += [f"{each:.2f} GiB" for each in memory]
    return f"| {method} | {way} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--ways", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", choices=list(START), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile beside; it takes minutes to compile")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        from spunge.model.memory import peak_memory

        step = KINDS[args.peak](args.methods[0], args.ways[0], args.model, args.dtype)
        step()
        step()
        print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory())
        return
    kinds = ["ours", "plain", *(["compiled"] if args.compiled else [])]
    head = [
        "method",
        "trained",
        *kinds,
        *(f"ours / {kind}" for kind in kinds[1:]),
        *(f"peak, {kind}" for kind in kinds),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    for way in args.ways:
        for method in CASES[way]:
            if args.methods is None or method in args.methods:
                lines.append(measured(kinds, method, way, args.model, args.dtype, args.pairs))
                print(lines[-1], flush=True)
    if args.methods is None and len(args.ways) == len(CASES) and not args.compiled:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(START[args.dtype])
        PAGE.write_text(
            f"{before}{START[args.dtype]}\n{chr(10).join(lines)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
