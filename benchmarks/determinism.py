"""What depends on the number of threads, of processors, and on nothing: toy and real trainings, judgings and merges, compared.

    python benchmarks/determinism.py                                          # a toy
    python benchmarks/determinism.py --model models/smollm2-135m-instruct

Each variant is a process of its own with a cache of its own. A training or a judging is repeated by a whole run; a merge is that of
the first run's deltas each time. The table goes into docs/reliability.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from same_bytes import OFFLINE, lines, model
from same_bytes import recipes as toy_recipes

STEPS = {"steps": 3, "batch_size": 4}
METHODS = {
    "rmu": {"method": "rmu", "layer": 2, "learning_rate": 1e-3, **STEPS},
    "npo, LoRA": {"method": "npo", "trainable": {"kind": "lora", "rank": 4}, "learning_rate": 1e-3, **STEPS},
}
PROGRAM = """
import json, os, sys
processors, recipe, out = json.loads(sys.argv[1])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
import spunge
spunge.run(spunge.load_recipe(recipe), out)
"""
MERGE = """
import json, os, sys
processors, arguments = json.loads(sys.argv[1])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
sys.argv = ["spunge", *arguments]
from spunge.cli import main
main()
"""


class Variant(NamedTuple):
    name: str
    threads: int
    processors: int


FIRST = Variant("first", 1, 2)
OTHERS = (
    Variant("once more", 1, 2),
    Variant("2 threads", 2, 2),
    Variant("4 threads", 4, 2),
    Variant("1 processor", 1, 1),
)


def recipe(folder: Path, path: str, dtype: str, method: str) -> dict[str, Any]:
    """Toy rows of two topics; judged are questions, and completions of 16 tokens."""
    toy = toy_recipes(folder)["rmu"]
    prompts = [{"prompt": f"the capital of {land} is"} for land in ("france", "japan", "nepal", "spain")]
    completed = {
        "kind": "toxicity",
        "source": lines(folder / "prompts.jsonl", prompts),
        "scorer": "alt-profanity-check",
        "generation": {"max_new_tokens": 16},
        "by": "NULL",
    }
    plain = {"model": {"path": path, "dtype": dtype}, "unlearn": METHODS[method], "controls": [], "seeds": 1}
    return {**toy, **plain, "evaluate": [*toy["evaluate"][:2], completed]}


def child(program: str, variant: Variant, argument: list[Any], cache: Path) -> None:
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(variant.threads), "SPUNGE_CACHE": str(cache)}
    subprocess.run(
        [sys.executable, "-c", program, json.dumps([variant.processors, *argument])],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def deltas(out: Path) -> dict[str, Any]:
    from spunge.weights.delta import open_delta

    opened = {folder: open_delta(folder) for folder in sorted(out.glob("branches/*")) if folder.is_dir()}
    return {f"{folder.name}/{name}": delta.dense(name) for folder, delta in opened.items() for name in delta.tensors}


def far(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Length of the difference of all tensors, as a share of the first one's."""
    squares = [(float((one[name] - other[name]).square().sum()), float(one[name].square().sum())) for name in one]
    return float((sum(square for square, _ in squares) / sum(whole for _, whole in squares)) ** 0.5)


def scores(out: Path) -> list[float]:
    """All that was measured of the base."""
    files = sorted(out.glob("evaluation/base/*.json"))
    measures = [measure for file in files for measure in json.loads(file.read_text())["measures"]]
    return [number for measure in measures for number in (*measure["numerator"], *measure["denominator"])]


def texts(out: Path) -> list[str]:
    files = sorted(out.glob("evaluation/base/texts-*.jsonl"))
    return [text for file in files for line in file.read_text().splitlines() for text in json.loads(line)["texts"]]


def compared(first: Path, other: Path) -> dict[str, str]:
    distance = far(deltas(first), deltas(other))
    pairs = [*zip(scores(first), scores(other), strict=True)]
    written = [*zip(texts(first), texts(other), strict=True)]
    assert pairs
    assert written
    nats, differ = max(abs(one - two) for one, two in pairs), sum(one != two for one, two in written)
    return {
        "training": f"{distance:.1e}" if distance else "same",
        "judging, scores": f"{nats:.1e}" if nats else "same",
        "judging, completions": f"{differ} of {len(written)}" if differ else "same",
    }


def merged(first: Path, base: str, out: Path, variant: Variant) -> str:
    """A digest of the files of weights."""
    models = [word for folder in sorted(first.glob("branches/*")) for word in ("--model", str(folder))]
    child(
        MERGE,
        variant,
        [["merge", "--base", base, *models, "--density", "0.2", "--out", str(out)]],
        out.parent / "cache",
    )
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def table(folder: Path, name: str, path: str, dtype: str) -> list[list[str]]:
    """A row for each thing that is compared, of one model."""
    rows = []
    for method in METHODS:
        content, own = recipe(folder, path, dtype, method), folder / name / method
        for variant in (FIRST, *OTHERS):
            child(PROGRAM, variant, [content, str(own / variant.name)], own / f"cache {variant.name}")
        found = [compared(own / FIRST.name, own / variant.name) for variant in OTHERS]
        kinds = [*found[0]] if method == "rmu" else ["training"]
        rows += [
            [f"{kind}{f' ({method})' if kind == 'training' else ''}", *(each[kind] for each in found)] for kind in kinds
        ]
    first = folder / name / "rmu" / FIRST.name
    digests = [merged(first, path, folder / name / f"merged {each.name}", each) for each in (FIRST, *OTHERS)]
    rows.append(["merging", *("same" if digest == digests[0] else "differs" for digest in digests[1:])])
    return [[f"{name}, {dtype}: {row[0]}", *row[1:]] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="a model's folder, in place of the toy")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic on it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model(folder / "model")
        rows = [] if given.model else table(folder, "toy", str(folder / "model"), "float32")
        if given.model:
            real = str(Path(given.model).resolve())
            rows += table(folder, Path(real).name, real, given.dtype)
    print("\n".join(f"| {' | '.join(row)} |" for row in (["", *(each.name for each in OTHERS)], *rows)))


if __name__ == "__main__":
    main()
