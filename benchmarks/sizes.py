"""What one training takes for models of 1 to 405 billion parameters: memory, and seconds a step, from their published shapes.

    python benchmarks/sizes.py            # writes the table into docs/planning.md
    python benchmarks/sizes.py --device a100-80 --told

`benchmarks/sizes.json` holds the shapes, as the models' config.json files have them, and the published numbers of parameters, which
the planner's own count is held against. Nothing is loaded and nothing is measured: it is what `spunge plan --device` says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from spunge.data.samples import Samples
from spunge.recipe.training import Everything, LoRA
from spunge.run.planning.devices import CARDS, USABLE
from spunge.run.planning.estimate import Estimator
from spunge.run.planning.fitting import devices_for
from spunge.run.planning.skeleton import Skeleton
from spunge.run.planning.steps import Rows, Steps
from spunge.unlearning.calls import descending
from spunge.unlearning.npo import NPOSettings
from spunge.unlearning.rmu.rmu import RMU
from spunge.unlearning.rmu.settings import RMUSettings

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "planning.md"
START, END = "<!-- table: python benchmarks/sizes.py -->", "<!-- end of table: sizes.py -->"
BATCH, TOKENS = 4, 512
WAYS = ("RMU", "NPO, LoRA", "again", "again, 4 bits", "NPO in full, again, 8-bit AdamW")
UNSHARED = ("RMU", "again, 4 bits")  # that several devices do not train together


def estimator(config: Any, device: str, recomputed: bool = False, packed: bool = False) -> Estimator:
    skeleton = Skeleton(config, torch.bfloat16, recomputed=recomputed, gpu=True)
    return Estimator(skeleton, skeleton, CARDS[device], None, train_in="4bit" if packed else None)


def steps_of(way: str, depth: int) -> Steps:
    rows = Rows([Samples(pa.table({"text": pa.array([], pa.string())}))], [TOKENS], BATCH, packed=True)
    sides: Any = {"forget": rows, "retain": rows}
    if way == "RMU":
        settings = RMUSettings(keep_activations=0)
        assert RMU.last_block is not None
        blocks = (RMU.last_block(settings, depth) or 0) + 1
        return Steps(1, 1, RMU.calls(settings, depth), None, "adamw", sides, True, False, blocks=blocks)
    full = "full" in way
    what = Everything() if full else LoRA(targets="all-linear")
    return Steps(1, 1, descending(NPOSettings()), what, "adamw_8bit" if full else "adamw", sides, True, False)


def row(name: str, shape: dict[str, Any], device: str) -> str:
    from transformers import AutoConfig

    published = shape.pop("entries")
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    counted = Skeleton(config, torch.bfloat16).entries()
    if counted != published:
        raise ValueError(f"{name} has {published:,} parameters, and the shape {counted:,}")
    cells = [name, f"{counted / 1e9:.2f}"]
    for way in WAYS:
        size = estimator(config, device, "again" in way, "4 bits" in way)
        steps = steps_of(way, config.num_hidden_layers)
        taken = size.training(steps)
        there = [card.name for card in sorted(CARDS.values(), key=lambda card: card.memory)]
        smallest = next((card for card in there if taken.memory <= USABLE * CARDS[card].memory), "none")
        if smallest == "none" and way not in UNSHARED:
            count = devices_for(size, steps, most=1024)
            smallest = "none" if count is None else f"{count} x {device}"
        cells.append(f"{taken.memory / 2**30:.0f} GiB, {taken.seconds:.2g} s ({smallest})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CARDS, default="h100")
    parser.add_argument("--told", action="store_true", help="print the table alone")
    args = parser.parse_args()
    head = ["model", "parameters, 10^9", *WAYS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    for name, shape in json.loads((HERE / "sizes.json").read_text(encoding="utf-8")).items():
        lines.append(row(name, shape, args.device))
        print(lines[-1], flush=True)
    if not args.told and args.device == "h100":
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(f"{before}{START}\n{chr(10).join(lines)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
