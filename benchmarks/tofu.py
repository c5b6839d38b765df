"""TOFU: what is splitting good for? Settings in tofu.yaml beside this; the figures go to OUT/tofu.json.

    python benchmarks/tofu.py run --data ../shared/data/tofu --out runs/tofu          # resumable; hours on two cores
    python benchmarks/tofu.py run ... --device cuda:0 --jobs 4 --seconds 500          # minutes on a GPU; what does not fit is left

A run teaches the model all 200 authors and retrains it without the last 20; then it unlearns these 20 joint, split by author,
split at random and one after the other, sets each one's scale so that 0.95 of the probability of retained answers stays, and
judges. All runs share the two taught models through the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parent.parent
SETTINGS = Path(__file__).with_suffix(".yaml")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
AUTHORS = range(180, 200)
GRADDIFF = {"unlearn": {"method": "graddiff", "learning_rate": 1e-4}}
KEPT = ("stage", "subject", "metric", "value", "low", "high", "n", "group")


class Variant(NamedTuple):
    """A run: what is laid over tofu.yaml."""

    name: str
    changes: dict[str, Any]
    after: str | None = None  # a run whose branches it takes


def variants() -> list[Variant]:
    """The most telling first."""
    several = [
        Variant(f"{method}, seed {seed}", {**changes, "seed": seed})
        for seed in range(3)
        for method, changes in (("npo", {}), ("graddiff", GRADDIFF))
    ]
    alone: dict[str, Any] = {"reference": None, "aggregates": {}}
    requests = [
        Variant(
            f"npo, the first {count} authors",
            {
                **alone,
                "controls": ["joint", "sequential"],
                "forget": {"where": f"author between 180 and {179 + count}"},
            },
        )
        for count in (5, 10)
    ]
    parts = [
        Variant(f"npo in {20 // size} parts", {"split": {"by": f"author // {size}"}, "controls": []})
        for size in (2, 4, 10)
    ]
    back = {**alone, "controls": [], "forget": {"where": "author > 180"}}
    return [*several, *requests, *parts, Variant("npo, the first author taken back", back, "npo, seed 0")]


def laid_over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Mappings merged, key by key; a method of another name takes none of the first one's settings but for the steps."""
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) and value else value
    return merged


def recipe(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    text = SETTINGS.read_text().replace("DATA", str(options.data.resolve()))
    content = laid_over(yaml.safe_load(text), variant.changes)
    content["model"] |= {"path": str(options.model.resolve()), "device": options.device}
    reference = ["reference:retrained"] if content.get("reference") else []
    if variant.name == "teaching":
        content["evaluate"] = content["evaluate"][:1]
    for entry in content["evaluate"]:  # the branches alone are not judged: twenty of them
        entry["stages"] = ["base", *reference, *(f"control:{name}" for name in content["controls"]), "merged"]
    if options.toy:
        content["teach"] |= {"epochs": 1, "where": "author in (1, 2, 180, 181)"}
        content["forget"]["where"] += " and author < 182"
        content["retain"]["where"] = "author in (1, 2)"
        content["unlearn"] |= {"epochs": 1} if content["unlearn"]["method"] != "precomputed" else {}
        for entry in content["evaluate"]:
            entry["limit"] = 8
        content["evaluate"][0]["where"] = "author in (1, 2)"
        content["evaluate"][1]["where"] = "author < 182"
    if variant.after is not None:
        first = folder(options.out, variant.after)
        kept = AUTHORS[1 : 2 if options.toy else None]
        content["unlearn"] = {
            "method": "precomputed",
            "branches": {str(author): str(first / "branches" / str(author)) for author in kept},
        }
        content["merge"]["scale"] = scale_of(first)
        content["calibrate"] = None
    return content


def scale_of(run: Path) -> float:
    """That `merged` was calibrated to."""
    content = json.loads((run / "results.json").read_text())
    merged = next(model for model in content["models"] if model["stage"] == "merged")
    return float(merged["calibration"][0]["scale"])


def folder(out: Path, name: str) -> Path:
    return out / name.replace(", ", "-").replace(" ", "-")


def run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    waiting = [each for each in variants() if not options.only or any(word in each.name for word in options.only)]
    # One teaches, for all; and some take others' branches.
    teaching = [
        Variant(
            "teaching",
            {
                "split": None,
                "controls": [],
                "unlearn": {"steps": 1, "epochs": None},
                "calibrate": None,
                "aggregates": {},
            },
        )
    ]
    alone, after = ([each for each in waiting if bool(each.after) is told] for told in (False, True))
    groups = [teaching if options.jobs > 1 else [], alone, after]
    with ThreadPoolExecutor(options.jobs) as pool:
        for group in groups:
            for name, said in pool.map(lambda variant: one(variant, options, end), group):
                print(f"{name}: {said}", flush=True)
                collect(options)


def one(variant: Variant, options: argparse.Namespace, end: float) -> tuple[str, str]:
    place = folder(options.out, variant.name)
    left = end - time.monotonic()
    if left < 20:
        return variant.name, "no time left"
    if variant.after is not None and not (folder(options.out, variant.after) / "results.json").exists():
        return variant.name, f"{variant.after} is not finished"
    file = options.out / f"{place.name}.yaml"
    file.write_text(yaml.safe_dump(recipe(variant, options), sort_keys=False))
    command = [sys.executable, "-m", "spunge.cli", "run", str(file), "--out", str(place)]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **OFFLINE,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(options.threads),
    }
    environment.setdefault("SPUNGE_CACHE", str(options.out / "cache"))
    started = time.monotonic()
    with (options.out / f"{place.name}.log").open("w") as log:
        try:
            ended = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=left)
        except subprocess.TimeoutExpired:
            return variant.name, "stopped: no time left"
    return variant.name, f"exit {ended.returncode} after {time.monotonic() - started:.0f} s"


def collect(options: argparse.Namespace) -> None:
    """The finished runs' figures, without a text, in one small file."""
    runs = {}
    for variant in variants():
        place = folder(options.out, variant.name)
        if not (place / "results.json").exists():
            continue
        content = json.loads((place / "results.json").read_text())
        runs[variant.name] = {
            "models": content["models"],
            "rows": [{key: row[key] for key in KEPT if key in row} for row in content["rows"]],
            "differences": content["differences"],
            "seconds": dict(seconds(place)),
            "merge": merge_facts(place),
        }
    (options.out / "tofu.json").write_text(json.dumps({"device": options.device, "runs": runs}, indent=0) + "\n")


def seconds(place: Path) -> Iterator[tuple[str, float]]:
    """Stage -> what making it took."""
    for file in sorted((place / "stamps").rglob("*.json")):
        stamp = json.loads(file.read_text())
        if "seconds" in stamp:
            yield str(file.relative_to(place / "stamps").with_suffix("")), stamp["seconds"]


def merge_facts(place: Path) -> dict[str, Any]:
    content = json.loads((place / "merge.json").read_text()) if (place / "merge.json").exists() else {}
    return {key: value for key, value in content.items() if key != "tensors"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "tofu")
    runs.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    runs.add_argument("--out", type=Path, default=ROOT / "runs" / "tofu")
    runs.add_argument("--device", default="cpu")
    runs.add_argument("--jobs", type=int, default=1, help="runs at once")
    runs.add_argument("--threads", type=int, default=2, help="of each run, on the CPU")
    runs.add_argument(
        "--seconds", type=float, default=1e9, help="after which no more is begun, and what runs is stopped"
    )
    runs.add_argument("--only", nargs="*", help="words in the names of the runs")
    runs.add_argument("--toy", action="store_true", help="four authors, one epoch, eight items: to try it")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
