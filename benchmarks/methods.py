"""Every unlearning method at one budget: what each forgets, keeps and costs, alone (joint) and as SPUNGE.

    python benchmarks/methods.py --work DIR                        # every row that is not there yet, then the page
    python benchmarks/methods.py --work DIR --only npo --only dpo  # of these methods alone
    python benchmarks/methods.py --work DIR --on tofu              # on one of the two questions
    python benchmarks/methods.py --page                            # docs/benchmarks/methods.md from what is kept

The questions are the demo's capitals and a small part of TOFU, whose base is taught once. A row is a run in a process of its own,
kept in benchmarks/methods.json as soon as it is measured; it is measured again when the method's version, its settings in
methods.yaml or --threads change. Methods that work on answers learn from questions made of the demo's own pairs of country and
capital, worded otherwise than the test's. DIR needs 3 GB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from methods_page import write_page
from methods_recipes import RECIPES, settings_of

from spunge.registry import METHODS

ROOT = Path(__file__).parent.parent
ROWS = Path(__file__).with_suffix(".json")
BASE = "base"
OF = ("control:joint", "merged")


def measure(question: str, name: str, options: argparse.Namespace) -> str | None:
    """Measure and keep a row. Returns why there is none, or None."""
    folder = options.work / question / name
    file = folder.with_suffix(".yaml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[question](name, options)
    stages = ["base"] if name == BASE else list(OF)
    for block in recipe["evaluate"]:
        block["stages"] = stages
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = {"SPUNGE_CACHE": str(options.work / "cache"), "OMP_NUM_THREADS": str(options.threads), **os.environ}
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "spunge", "run", str(file), "--out", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = [line for line in folder.with_suffix(".log").read_text().splitlines() if line.strip()][-1:]
        return f"exit {process.returncode}: {' '.join(last)}"
    row = {
        "asked": asked(question, name, options.threads),
        "memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    keep(question, name, {**row, **costs(folder, name), "scores": scores(folder, stages)})
    shutil.rmtree(folder)
    return None


def asked(question: str, name: str, threads: int) -> dict[str, Any]:
    """What a row was measured with."""
    if name == BASE:
        return {"settings": settings_of("tofu") if question == "tofu" else {}}
    taught = {"taught": settings_of("tofu")} if question == "tofu" else {}
    return {"version": METHODS.version(name), "settings": settings_of(name), "threads": threads, **taught}


def costs(folder: Path, name: str) -> dict[str, Any]:
    """Seconds of the joint run's training, the median of its steps, and whose training stopped itself, after which step."""
    if name == BASE:
        return {}
    log = (folder / "controls" / "joint" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["seconds"] for line in log]
    stamp = json.loads((folder / "stamps" / "control" / "joint.json").read_text())
    files = {"joint": folder / "controls" / "joint" / "delta.json"}
    files |= {file.parent.name: file for file in sorted(folder.glob("branches/*/delta.json"))}
    told = {stage: json.loads(file.read_text()) for stage, file in files.items()}
    stopped = {stage: delta["steps"] for stage, delta in told.items() if delta["stopped"]}
    return {"step": statistics.median(steps), "seconds": stamp["seconds"], **({"stopped": stopped} if stopped else {})}


def scores(folder: Path, stages: list[str]) -> dict[str, dict[str, list[float]]]:
    """Stage -> subject and metric -> the score and its interval."""
    content = json.loads((folder / "results.json").read_text())
    told: dict[str, dict[str, list[float]]] = {stage: {} for stage in stages}
    for row in content["rows"]:
        if row["stage"] in told:
            values = [round(float(row[key]), 5) for key in ("value", "low", "high") if key in row]
            told[row["stage"]][f"{row['subject']}: {row['metric']}"] = values
    return told


def kept() -> dict[str, dict[str, Any]]:
    """Question -> method -> row."""
    rows: dict[str, dict[str, Any]] = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    return {question: rows.get(question, {}) for question in RECIPES}


def keep(question: str, name: str, row: dict[str, Any]) -> None:
    rows = kept()
    rows[question][name] = row
    parts = [
        f'"{question}": {{\n' + ",\n".join(f'"{key}": {json.dumps(each)}' for key, each in some.items()) + "\n}"
        for question, some in rows.items()
    ]
    beside = ROWS.with_suffix(".part")
    beside.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    beside.replace(ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in METHODS.names() if name != "precomputed"]
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", action="append", choices=known, metavar="NAME")
    parser.add_argument("--on", action="append", choices=list(RECIPES))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "tofu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    failed = []
    if not options.page:
        if options.work is None:
            parser.error("--work: give a folder for the runs")
        for question in options.on or RECIPES:
            for name in (BASE, *(options.only or known)):
                row = kept()[question].get(name)
                if row and row["asked"] == asked(question, name, options.threads):
                    continue
                reason = measure(question, name, options)
                failed += [name] if reason else []
                print(f"{question}, {name}: {reason or 'measured'}", flush=True)
    write_page(kept(), known)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
