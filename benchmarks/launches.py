"""What a training step asks of a GPU, counted without one: operations by kind, and waits for their results; ours beside plain peft.

    OMP_NUM_THREADS=1 python benchmarks/launches.py              # writes the tables into docs/benchmarks/launches.md
    python benchmarks/launches.py --methods npo --kinds          # one method, and which operations there are how often

A LoRA step on a GPU of today waits for the processor, which gives it one operation after the other. So the step is run here on a
model of the 1B's depth whose layers are narrow, in the forms that a GPU would be given (`forms.py`), and every operation below
autograd is counted. A view starts nothing on a GPU; an operation on a list of tensors (foreach, fused) counts once here, and is a
few starts there. "Waits": what a GPU would have to bring to an end before the processor goes on (a number that is read, places
found by a mask). "Host ms": processor time of the whole step, nearly all of which is spent on starting operations.
"""

import argparse
import importlib
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shape, build, write_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "launches.md"
START, END = "<!-- table: python benchmarks/launches.py -->", "<!-- end of table -->"
METHODS = ("npo", "graddiff", "simnpo", "rmu")
REAL = SHAPES["1B-llama3"]
NARROW = Shape(32, 96, REAL.layers, 4, 2, 512)  # as deep, and little to compute
TEXTS = (4, 24)  # of a batch, tokens of each
WHOLE = 4 * 256  # tokens of the batch that it stands for
WAITS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.is_nonzero",
    "aten.equal",
    "aten.unique",
    "aten._unique2",
}
NOTHING = {  # gives memory or another look at it, and starts nothing
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.empty_strided",
    "aten.detach",
    "aten.lift_fresh",
    "aten._unsafe_view",
    "aten.resize_",
    "aten.set_",
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is called inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.starts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        masked = name in ("aten.index", "aten.index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in WAITS or masked:
            self.waits[f"{name} by a mask" if masked else name] += 1
        if func.is_view or name in NOTHING:
            self.views += 1
        else:
            self.starts[name] += 1
        return func(*args, **(kwargs or {}))

    def taken(self) -> "Counted":
        """The counts so far, which begin anew."""
        since = Counted()
        since.starts, since.waits, since.views = self.starts, self.waits, self.views
        self.starts, self.waits, self.views = Counter(), Counter(), 0
        return since


@torch.library.custom_op("gpu::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As one operation, which it is on a GPU; a CPU's torch takes it apart."""
    out: Tensor = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, epsilon)[0]
    return out


@torch.library.custom_op("gpu::rms_norm_backward", mutates_args=())
def _norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    inverse = x.float().square().mean(-1, keepdim=True).add(epsilon).rsqrt()
    unit, of_unit = x * inverse, gradient.float() * weight
    return ((of_unit - unit * (of_unit * unit).mean(-1, keepdim=True)) * inverse).to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        out: Tensor = _norm(x, weight, epsilon)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _norm_backward(gradient, *ctx.saved_tensors, ctx.epsilon), None, None


def _norm_as_one(x: Tensor, _shape: Any, weight: Tensor, epsilon: float) -> Any:
    return _Norm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]


def as_on_a_gpu(stack: ExitStack) -> None:
    """Until the stack ends, a CPU's tensors are taken as a GPU's: by torch's choice of foreach, and by our choice of forms."""
    from unittest.mock import patch

    from spunge.unlearning.forms import FORMS

    supported = torch.utils._foreach_utils._get_foreach_kernels_supported_devices()
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        stack.enter_context(
            patch.object(
                importlib.import_module(name), "_get_foreach_kernels_supported_devices", lambda: [*supported, "cpu"]
            )
        )
    # The pieces of the narrow model's losses are as many as those of the model that it stands for.
    real = FORMS["cuda"]
    stack.enter_context(patch.object(torch.nn.functional, "rms_norm", _norm_as_one))
    scale = NARROW.vocabulary * TEXTS[0] * TEXTS[1] / (REAL.vocabulary * WHOLE)
    stack.enter_context(patch.dict(FORMS, cpu=replace(real, piece=int(real.piece * scale))))


def ours(method: str, folder: Path, steps: int) -> Callable[[Callable[[], None]], None]:
    """A branch of the product, which calls what it is given after each step."""
    from spunge.model.loading import load_base, model_depth
    from spunge.recipe.loading import load_recipe
    from spunge.registry import METHODS as WAYS
    from spunge.run.inputs import BaseInputs, SeedInputs
    from spunge.unlearning.method import Task

    # Texts are drawn again before the last steps, as in a run's later epochs: what is kept of the base is there.
    unlearn: dict[str, Any] = {"method": method, "steps": steps, "batch_size": TEXTS[0], "max_length": TEXTS[1]}
    unlearn |= {"max_damage": None, "layer": 4} if method == "rmu" else {"max_damage": None}
    if method != "rmu":
        unlearn["trainable"] = {"kind": "lora", "rank": 16, "targets": "all-linear", "dropout": 0.0}
    recipe = load_recipe(
        {
            "model": {"path": str(folder), "dtype": "bfloat16", "device": "cpu"},
            "forget": {"source": str(folder / "forget.jsonl")},
            "retain": {"source": str(folder / "retain.jsonl")},
            "unlearn": unlearn,
            "controls": [],
        }
    )
    inputs, way = SeedInputs(recipe, BaseInputs(recipe, folder / "cache")), WAYS.get(method)
    last = None if way.last_block is None else way.last_block(recipe.unlearn, model_depth(folder, recipe.model))
    base = load_base(folder, recipe.model, last)
    parts = {part.value: part.samples for part in inputs.parts.parts}
    log = folder / f"{method}.jsonl"

    def go(mark: Callable[[], None]) -> None:
        def progress(_done: int, _total: int, _note: str = "", /) -> None:
            mark()

        way.unlearn(
            Task(base, parts, inputs.retain, dict.fromkeys(parts, 0), log, progress=progress, kept={}), recipe.unlearn
        )

    return go


def plain(method: str, folder: Path, steps: int) -> Callable[[Callable[[], None]], None]:
    """The same steps with transformers and peft alone, and a line of a log for each."""
    import train

    train.TOKENS = TEXTS
    step = plain_rmu(folder) if method == "rmu" else train.plain(method, "lora", str(folder), "bfloat16")

    def go(mark: Callable[[], None]) -> None:
        for _ in range(steps):
            step()
            mark()

    return go


def plain_rmu(folder: Path) -> Callable[[], None]:
    """A step of RMU as its authors wrote it: a second model beside, both called whole, their hidden states read by a hook."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2)]
    learned = [models[0].model.layers[block].mlp.down_proj.weight for block in (2, 3, 4)]
    models[0].requires_grad_(False)
    for weight in learned:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)
    goal = torch.rand(NARROW.hidden, dtype=torch.bfloat16)
    texts = torch.randint(3, NARROW.vocabulary, (2, *TEXTS))

    def states(model: Any, ids: Tensor) -> Tensor:
        read: list[Any] = []
        hook = model.model.layers[4].register_forward_hook(lambda _module, _inputs, out: read.append(out))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hook.remove()
        return read[0] if isinstance(read[0], Tensor) else read[0][0]

    def step() -> None:
        forget = torch.nn.functional.mse_loss(states(models[0], texts[0]), goal.expand(*TEXTS, -1))
        after = states(models[0], texts[1])
        with torch.no_grad():
            before = states(models[1], texts[1])
        loss = forget + 100 * torch.nn.functional.mse_loss(after, before)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(kind: Callable[..., Any], method: str, folder: Path, steps: int) -> tuple[Counted, float]:
    """What the last of some steps asks for, and the median of their processor times."""
    with ExitStack() as stack:
        as_on_a_gpu(stack)
        ends: list[float] = []
        kind(method, folder, steps)(lambda: ends.append(time.process_time()))
        counted = Counted()
        taken: list[Counted] = []

        def mark() -> None:
            taken.append(counted.taken())

        go = kind(method, folder, steps)
        with counted:
            go(mark)
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return taken[-1], statistics.median(seconds[steps // 2 :])


def write_model(folder: Path) -> None:
    """The narrow model, and texts of three batches of each side."""
    build(folder, NARROW)
    write_tokenizer(folder, NARROW.vocabulary)
    for seed, side in enumerate(("forget", "retain")):
        drawn = torch.randint(
            3, NARROW.vocabulary, (3 * TEXTS[0], TEXTS[1]), generator=torch.Generator().manual_seed(seed)
        )
        lines = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n" for row in drawn.tolist()]
        (folder / f"{side}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kinds", action="store_true", help="each operation's count beside")
    args = parser.parse_args()
    lines = [
        "| method | starts, ours | plain | ours / plain | views, ours | plain | waits, ours | plain | host ms, ours | plain |"
    ]
    lines.append("|" + "---|" * 10)
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for method in args.methods:
            (own, own_s), (other, other_s) = (
                measured(kind, method, Path(folder), args.steps) for kind in (ours, plain)
            )
            counts = [sum(own.starts.values()), sum(other.starts.values())]
            lines.append(
                f"| {method} | {counts[0]:,} | {counts[1]:,} | **{counts[0] / counts[1]:.2f}** | {own.views:,} | {other.views:,} | "
                f"{sum(own.waits.values())} | {sum(other.waits.values())} | {own_s * 1e3:.0f} | {other_s * 1e3:.0f} |"
            )
            print(lines[-1], flush=True)
            if args.kinds:
                print_kinds(own, other)
    if set(args.methods) == set(METHODS) and not args.kinds:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(START)
        PAGE.write_text(f"{before}{START}\n{chr(10).join(lines)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def print_kinds(own: Counted, other: Counted) -> None:
    """Each operation's count, the most frequent first."""
    for name in sorted(own.starts | other.starts, key=lambda name: -max(own.starts[name], other.starts[name])):
        print(f"    {name:<45} {own.starts[name]:>6} {other.starts[name]:>6}")
    print(f"    waits: {dict(own.waits)} {dict(other.waits)}")


if __name__ == "__main__":
    main()
