"""What `spunge plan` says of a training, beside what its steps take: memory and processor seconds, for every kind of method.

    OMP_NUM_THREADS=1 python benchmarks/plan.py                      # writes the table into docs/planning.md
    OMP_NUM_THREADS=1 python benchmarks/plan.py --cases npo tvn-all  # some of them, told alone

Each case is a recipe of plain texts (or prompts and answers, where a method needs them) at batch 4, whose first training takes a
few steps in a process of its own. Memory is that process's peak. Time is processor seconds of a step after the first, so that what
else the machine does counts less.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "planning.md"
START, END = "<!-- table: python benchmarks/plan.py -->", "<!-- end of table: plan.py -->"
GIB = 2**30
LORA = {"kind": "lora", "targets": "all-linear"}
ALL = {"kind": "all"}
CASES: dict[str, dict[str, Any]] = {
    "tvn": {"method": "tvn", "trainable": LORA},
    "tvn-all": {"method": "tvn", "trainable": ALL},
    "ga": {"method": "ga", "trainable": LORA},
    "ga-all": {"method": "ga", "trainable": ALL},
    "graddiff": {"method": "graddiff", "trainable": LORA},
    "npo": {"method": "npo", "trainable": LORA},
    "npo-all": {"method": "npo", "trainable": ALL},
    "npo-kl": {"method": "npo", "trainable": LORA, "retain_loss": "kl"},
    "simnpo": {"method": "simnpo", "trainable": LORA},
    "wga": {"method": "wga", "trainable": LORA},
    "dpo": {"method": "dpo", "trainable": LORA},
    "idk": {"method": "idk", "trainable": LORA},
    "undial": {"method": "undial", "trainable": LORA},
    "sku": {"method": "sku", "trainable": LORA, "answers": 2},
    "rmu": {"method": "rmu"},
    "tar": {"method": "tar", "trainable": LORA, "attack": {"steps": 2}},
    "tar-all": {"method": "tar", "trainable": ALL, "attack": {"steps": 1}},
    "kga": {"method": "kga", "trainable": LORA, "copies": {"epochs": 0.1}},
    "elm": {"method": "elm", "trainable": LORA, "written_tokens": 2},
    "altpo": {"method": "altpo", "trainable": LORA, "alternatives": {"count": 1, "tokens": 2}},
    "npo-checkpointed": {"method": "npo", "trainable": LORA},
    "ga-8bit-adam": {"method": "ga", "trainable": ALL, "optimizer": "adamw_8bit"},
    "npo-4bit": {"method": "npo", "trainable": LORA},
}
MODEL: dict[str, dict[str, Any]] = {
    "npo-checkpointed": {"checkpoint_activations": True},
    "npo-4bit": {"train_in": "4bit"},
}
ASKED = {"dpo", "idk", "sku", "altpo"}  # learn answers to prompts
ROWS = {"elm": 8, "altpo": 8}  # for which the base writes first, which no step's time has


def write_rows(folder: Path, words: int, count: int = 64) -> None:
    """Rows of about so many tokens, different ones."""
    drawn = random.Random(0)
    known = ["river", "stone", "letter", "window", "garden", "night", "market", "teacher", "winter", "music", "road"]
    for name in ("forget", "retain"):
        rows = []
        for _ in range(count):
            text = " ".join(drawn.choice(known) for _ in range(words))
            half = len(text) // 2
            rows.append({"text": text, "prompt": text[:half], "completion": text[half:]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(case: str, model: str, folder: Path, length: int, steps: int) -> dict[str, Any]:
    columns = {"prompt": "prompt", "completion": "completion"} if case in ASKED else {"text": "text"}
    recipe = {
        "model": {"path": model, **MODEL.get(case, {})},
        "forget": {"source": str(folder / "forget.jsonl"), **columns},
        "retain": {"source": str(folder / "retain.jsonl"), **columns},
        "unlearn": {"steps": steps, "batch_size": 4, "max_length": length, **CASES[case]},
        "controls": [],
    }
    if case.startswith(("tvn", "ga")):
        del recipe["retain"]
    return recipe


def main() -> None:
    import spunge
    from spunge.recipe.loading import load_recipe
    from spunge.run.planning.dry import dry_steps

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    head = [
        "method",
        "planned GiB",
        "measured",
        "measured / planned",
        "planned s a step",
        "measured",
        "measured / planned",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    ratios: list[tuple[float, float]] = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), args.length, ROWS.get(case, 64))
            recipe = load_recipe(recipe_of(case, args.model, Path(folder), args.length, args.steps))
            steps = (args.steps, 2 * args.steps)
            planned, longer = (
                step
                for count in steps
                for step in spunge.plan(
                    load_recipe(recipe_of(case, args.model, Path(folder), args.length, count)), Path(folder) / "run"
                ).stages
                if step.stage.startswith("branch")
            )
            measured = dry_steps(recipe, args.steps)
        memory = (planned.memory or 0) / GIB
        # What comes before the first step is in both, and no step.
        seconds = ((longer.seconds or 0) - (planned.seconds or 0)) / (steps[1] - steps[0])
        ratios.append((measured.memory / GIB / memory, measured.processor / seconds))
        lines.append(
            f"| {case} | {memory:.2f} | {measured.memory / GIB:.2f} | **{ratios[-1][0]:.2f}** | {seconds:.2f} | "
            f"{measured.processor:.2f} | **{ratios[-1][1]:.2f}** |"
        )
        print(lines[-1], flush=True)
    for name, each in zip(("memory", "time"), zip(*ratios, strict=True), strict=True):
        print(f"{name}: {min(each):.2f} to {max(each):.2f}, median {statistics.median(each):.2f}")
    if args.cases == list(CASES):
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        text = f"{before}{START}\n{chr(10).join(lines)}\n{END}{rest.split(END)[1]}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
