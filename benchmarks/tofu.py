"""TOFU: what is splitting good for? Settings are those of the recipe tofu-small; the figures go to OUT/tofu.json.

    python benchmarks/tofu.py run --data ../shared/data/tofu --out runs/tofu          # resumable; hours on two cores
    python benchmarks/tofu.py page --results runs/tofu/tofu.json                      # the tables of docs/tofu.md
    python benchmarks/tofu.py run ... --device cuda:0 --jobs 4 --seconds 500          # minutes on a GPU; what does not fit is left

A run teaches the model 60 authors and retrains it without the last 20; then it unlearns these 20 joint, split by author,
split at random and one after the other, sets each one's scale so that 0.95 of the probability of retained answers stays, and
judges. All runs share the two taught models through the cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from tofu_page import PARTS, REQUESTS, RESULTS, write_page

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "src" / "spunge" / "recipes" / "tofu-small.yaml"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# With the published ratio of the terms; as many passes over the rows as NPO takes.
RMU = {"method": "rmu", "epochs": 2, "batch_size": 5, "retain_batch_size": 3, "learning_rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {"npo": {}, "rmu": {"unlearn": RMU}}
RULES = (
    {"name": "sum", "merge": {"rule": "task_arithmetic"}},
    {"name": "mean", "merge": {"rule": "average"}},
    *(
        {"name": f"ties_norm-{power}", "merge": {"rule": "ties_norm", "density": 0.5, "power": power}}
        for power in (1, 2, "max")
    ),
)
WRITTEN = ("kept", "forget")  # evaluations that ask for no text: of the variants
TOLD = (  # in docs/tofu.md
    *("answer probability", "extraction strength", "truth ratio", "ROUGE-L recall"),
    *("AUROC of loss", "AUROC of a bag of words", "model utility", "forget quality"),
)
KEPT = ("stage", "evaluation", "subject", "metric", "value", "low", "high", "n", "group")


class Variant(NamedTuple):
    """A run: what is laid over tofu-small."""

    name: str
    changes: dict[str, Any]
    after: str | None = None  # a run whose branches it takes


def variants() -> list[Variant]:
    """The most telling first."""
    alone: dict[str, Any] = {"reference": None, "aggregates": {}}
    several = [
        Variant(f"{method}, seed {seed}", {**changes, **(alone if seed else {}), "seed": seed})
        for seed in range(3)
        for method, changes in METHODS.items()
    ]
    first = "npo, seed 0"
    requests = [
        Variant(
            f"rmu, the first {count} authors",
            {
                **alone,
                "unlearn": {**RMU, "epochs": 40},
                "controls": ["joint", "sequential"],
                "forget": {"where": f"author between 180 and {179 + count}"},
            },
            "rmu, 40 passes",
        )
        for count in REQUESTS
    ]
    parts = [
        Variant(
            f"npo in {parts} parts",
            {**alone, "split": {"by": f"(author - 180) // {20 // parts}"}, "controls": []},
            first,
        )
        for parts in PARTS
    ]
    back = [
        Variant(
            f"{name}, the first author taken back",
            {**alone, **changes, "controls": [], "forget": {"where": "author > 180"}},
            after,
        )
        for name, changes, after in (
            *((method, changes, f"{method}, seed 0") for method, changes in METHODS.items()),
            ("rmu, 40 passes", {"unlearn": {**RMU, "epochs": 40}}, "rmu, 40 passes"),
        )
    ]
    rules = [
        Variant(f"{method}, other rules", {**alone, **changes, "controls": list(RULES)}, f"{method}, seed 0")
        for method, changes in METHODS.items()
    ]
    adding = {"name": "sum", "merge": {"rule": "task_arithmetic"}}
    steps = [
        Variant(
            "npo, 2 passes, shared factors",
            {**alone, "controls": [adding], "unlearn": {"trainable": {"start": "shared"}}},
        ),
        # Each branch with as many steps as the joint run has in all.
        Variant(
            "npo in 5 parts, 10 passes",
            {**alone, "split": {"by": "(author - 180) // 4"}, "controls": [adding], "unlearn": {"epochs": 10}},
        ),
        *(
            Variant(
                f"rmu, {passes} passes",
                {**alone, "controls": [*arms, adding], "unlearn": {**RMU, "epochs": passes}},
            )
            for passes, arms in ((10, ["joint"]), (40, ["joint", "random", "sequential"]))
        ),
    ]
    return [several[0], several[1], *rules, *steps, *back, *requests, *parts, *several[2:]]


def laid_over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Mappings merged, key by key; a method takes none of another's settings."""
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value and "method" not in value:
            merged[key] = laid_over(old, value)
        else:
            merged[key] = value
    return merged


def settings(data: Path) -> dict[str, Any]:
    """The recipe's, with its rows in a folder."""
    content: dict[str, Any] = yaml.safe_load(SETTINGS.read_text().replace(" tofu/", f" {data}/"))
    return content


def recipe(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    content = laid_over(settings(options.data.resolve()), variant.changes)
    content["model"] |= {"path": str(options.model.resolve()), "device": options.device}
    if options.taught:
        content["teach"] = None
        content["model"]["path"] = str(options.taught.resolve())
        content["reference"] = content["reference"] and {"path": str(options.retrained.resolve()), "name": "retrained"}
    if variant.name == "teaching" or not content["reference"]:
        content["evaluate"] = [entry for entry in content["evaluate"] if entry["name"] in WRITTEN]
        for entry in content["evaluate"]:  # without the reference a truth ratio says little, and takes most of the time
            entry["metrics"] = [metric for metric in entry["metrics"] if metric != "truth_ratio"]
    if variant.name.endswith("taken back"):
        content["merge"]["scale"] = scale_of(folder(options.out, variant.after or ""))
        content["calibrate"] = None
    reference = ["reference:retrained"] if content.get("reference") else []
    controls = [control if isinstance(control, str) else control["name"] for control in content["controls"]]
    for entry in content["evaluate"]:  # the branches alone are not judged: twenty of them
        entry["stages"] = ["base", *reference, *(f"control:{name}" for name in controls), "merged"]
    if options.toy:
        content["teach"] |= {"epochs": 1, "where": "author in (1, 2) or author >= 180 and row % 5 < 2"}
        content["forget"]["where"] += " and row % 5 < 2"
        content["retain"]["where"] = "author in (1, 2)"
        content["unlearn"] |= {"epochs": 1}
        content["calibrate"] = content["calibrate"] and content["calibrate"] | {"tries": 2}
        for entry in content["evaluate"]:
            entry["limit"] = 40
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
    command = [sys.executable, "-m", "spunge", "run", str(file), "--out", str(place)]
    if variant.after is not None:
        command += ["--from", str(folder(options.out, variant.after))]
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
            "models": [
                {key: model[key] for key in ("stage", "scale", "calibration") if key in model}
                for model in content["models"]
            ],
            "rows": [
                rounded({key: row[key] for key in KEPT if key in row})
                for row in content["rows"]
                if row["metric"] in TOLD
            ],
            "seconds": dict(seconds(place)),
            "merge": merge_facts(place),
            "losses": losses(place),
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
    (options.out / "tofu.json").write_text(f'{{"device": {json.dumps(options.device)}, "runs": {{\n{lines}\n}}}}\n')


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def seconds(place: Path) -> Iterator[tuple[str, float]]:
    """Stage -> what making it took."""
    for file in sorted((place / "stamps").rglob("*.json")):
        stamp = json.loads(file.read_text())
        if "seconds" in stamp:
            yield str(file.relative_to(place / "stamps").with_suffix("")), stamp["seconds"]


def losses(place: Path) -> dict[str, list[list[float]]]:
    """Step, forget and retain loss while the joint run and the first branch trained: every tenth of 200 steps, and the last."""
    logs = {"joint": place / "controls" / "joint", "branch": next(iter(sorted((place / "branches").glob("*"))), place)}
    found = {}
    for name, training in logs.items():
        if (training / "log.jsonl").is_file():
            lines = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
            kept = [line for line in lines if (line["step"] % 10 == 1 and line["step"] < 200) or line is lines[-1]]
            found[name] = [[line["step"], round(line["forget"], 3), round(line["retain"], 3)] for line in kept]
    return found


def merge_facts(place: Path) -> dict[str, Any]:
    """Means over the changed tensors and over pairs of branches."""
    if not (place / "merge.json").exists():
        return {}
    content = json.loads((place / "merge.json").read_text())
    tensors, cosine = content["tensors"].values(), content["cosine"]
    pairs = [value for at, row in enumerate(cosine) for value in row[at + 1 :]]
    return {
        "rule": content["rule"],
        "kept": fmean(fmean(each["kept"]) for each in tensors),
        "conflicts": fmean(each["conflicts"] for each in tensors),
        "cosine": fmean(pairs) if pairs else 1.0,
        "written": content["written"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "tofu")
    runs.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    runs.add_argument("--taught", type=Path, help="the taught model, where it is there: nothing is taught")
    runs.add_argument("--retrained", type=Path, help="beside --taught: the reference")
    runs.add_argument("--out", type=Path, default=ROOT / "runs" / "tofu")
    runs.add_argument("--device", default="cpu")
    runs.add_argument("--jobs", type=int, default=1, help="runs at once")
    runs.add_argument("--threads", type=int, default=2, help="of each run, on the CPU")
    runs.add_argument(
        "--seconds", type=float, default=1e9, help="after which no more is begun, and what runs is stopped"
    )
    runs.add_argument("--only", nargs="*", help="words in the names of the runs")
    runs.add_argument("--toy", action="store_true", help="four authors, one epoch, eight items: to try it")
    page = verbs.add_parser("page")
    page.add_argument("--results", type=Path, help="tofu.json of a run, to be kept in benchmarks/")
    options = parser.parse_args(arguments)
    if options.verb == "run":
        run(options)
        return
    if options.results:
        shutil.copyfile(options.results, RESULTS)
    write_page()


if __name__ == "__main__":
    main()
