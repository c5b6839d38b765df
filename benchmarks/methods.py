"""Every unlearning method on the demo's question: what each forgets, keeps and costs, alone (joint) and as SPUNGE.

    python benchmarks/methods.py --work DIR                 # all of them; writes the table into docs/benchmarks/methods.md
    python benchmarks/methods.py --work DIR npo dpo         # some of them; the others' figures stay

Each method is a run of the demo recipe in a process of its own, with the settings of benchmarks/methods.yaml. Methods that
work on answers learn from questions made of the demo's own pairs of country and capital, worded otherwise than the test's.
A run that DIR holds already is not done again.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "src" / "spunge" / "recipes" / "demo"
PAGE = ROOT / "docs" / "benchmarks" / "methods.md"
SETTINGS = Path(__file__).with_suffix(".yaml")
PHRASES = [
    "Question: What is the capital of {country}?\nAnswer:",
    "The capital city of {country} is called",
    "Q: Name the capital of {country}.\nA:",
    "If you fly to the capital of {country}, you land in",
    "{country} is governed from its capital,",
    "Country and capital: {country},",
]
FORGOTTEN, NEIGHBOURS = ("Europe", "Asia"), ("Africa", "Americas")
START, END = "<!-- table: python benchmarks/methods.py -->", "<!-- end of table -->"


def questions(file: Path) -> Path:
    """Prompts and completions from the demo's pairs."""
    rows = [json.loads(line) for line in (DEMO / "forget.jsonl").open(encoding="utf-8")]
    pairs = dict.fromkeys((row["continent"], row["country"], row["capital"]) for row in rows)
    lines = [
        {"continent": continent, "prompt": phrase.format(country=country), "completion": f" {capital}."}
        for continent, country, capital in pairs
        for phrase in PHRASES
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def recipe_of(name: str, work: Path, model: str) -> dict[str, Any]:
    """The demo recipe with a method's own settings in place of RMU's."""
    recipe: dict[str, Any] = yaml.safe_load((DEMO.parent / "demo.yaml").read_text(encoding="utf-8"))
    given = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    entry = dict(given["methods"][name])
    form = entry.pop("form")
    recipe["model"] = {"path": model}
    for block in [recipe["retain"], *recipe["evaluate"]]:
        block["source"] = str(DEMO.parent / block["source"])
    for block in recipe["evaluate"]:
        block.update(given["limits"].get(block["name"], {}))
        block["stages"] = ["base", "control:joint", "merged"]
    recipe["forget"] = {"source": str(DEMO / "forget.jsonl"), "text": "text"}
    if form == "questions":
        file = questions(work / "questions.jsonl")
        recipe["forget"] = {"source": str(file), "prompt": "prompt", "completion": "completion"}
    recipe["unlearn"] = {"method": name, **entry}
    return recipe


def measure(name: str, work: Path, model: str) -> None:
    """Run in a process of its own, so that its peak memory and processor time can be told."""
    folder = work / name
    if (folder / "cost.json").exists():
        return
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe_of(name, work, model), sort_keys=False), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "spunge.cli", "run", str(file), "--out", str(folder)])
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed")
    scale = 1 if sys.platform == "darwin" else 1024
    cost = {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * scale}
    (folder / "cost.json").write_text(json.dumps(cost))


def line_of(name: str, work: Path) -> list[str]:
    """Two lines of the table: joint and SPUNGE."""
    content = json.loads((work / name / "results.json").read_text())
    cost = json.loads((work / name / "cost.json").read_text())
    rows = {(row["stage"], row["subject"], row["metric"]): row for row in content["rows"]}
    steps = json.loads((work / "steps.json").read_text())
    lines = []
    for stage, called in (("control:joint", "joint"), ("merged", "SPUNGE")):
        cells = [_cell(rows[stage, subject, "accuracy"]) for subject in (*FORGOTTEN, *NEIGHBOURS, "facts")]
        plain = rows[stage, "plain text", "perplexity"]
        cells.append(_cell(plain, 1))
        cells += [f"{steps[name]:.2f} s", f"{cost['memory'] / 2**30:.1f} GiB"]
        lines.append(f"| {name if called == 'joint' else ''} | {called} | {' | '.join(cells)} |")
    return lines


def time_steps(names: list[str], work: Path, model: str) -> None:
    """Seconds a training step: the median of four of one branch's, one method after the other, on a machine that does nothing
    else. The joint control's steps are the same."""
    from spunge.data.selection import select_rows
    from spunge.data.split import split_rows
    from spunge.model.loading import load_base
    from spunge.recipe.loading import load_recipe
    from spunge.registry import METHODS
    from spunge.unlearning.method import Task

    found = {}
    for name in names:
        recipe = load_recipe(recipe_of(name, work, model), ["unlearn.steps=5"])
        part = split_rows(recipe).parts[0]
        retain = select_rows(recipe.retain, recipe, "retain").samples
        log = work / f"{name}-steps.jsonl"
        base = load_base(Path(model), recipe.model)
        task = Task(base, {part.value: part.samples}, retain, {part.value: 0}, log)
        METHODS.get(name).unlearn(task, recipe.unlearn)
        seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
        found[name] = statistics.median(seconds[1:])
    (work / "steps.json").write_text(json.dumps(found))


def _cell(row: dict[str, Any], digits: int = 2) -> str:
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f} {row['high']:.{digits}f}]"


def table(work: Path, names: list[str]) -> str:
    """The page's table, of the runs that are there."""
    done = [name for name in names if (work / name / "cost.json").exists()]
    content = json.loads((work / done[0] / "results.json").read_text())
    rows = {(row["stage"], row["subject"], row["metric"]): row for row in content["rows"]}
    base = [_cell(rows["base", subject, "accuracy"]) for subject in (*FORGOTTEN, *NEIGHBOURS, "facts")]
    head = ["method", "", *FORGOTTEN, *NEIGHBOURS, "facts", "perplexity", "a step", "memory"]
    lines = [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        f"| (base) | | {' | '.join(base)} | {_cell(rows['base', 'plain text', 'perplexity'], 1)} | | |",
        *(line for name in done for line in line_of(name, work)),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))["methods"])
    parser.add_argument("methods", nargs="*", default=known)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.methods:
        measure(name, given.work, given.model)
    if not (given.work / "steps.json").exists():
        time_steps(known, given.work, given.model)
    page = PAGE.read_text(encoding="utf-8")
    fresh = f"{START}\n{table(given.work, known)}\n{END}"
    PAGE.write_text(re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: fresh, page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
