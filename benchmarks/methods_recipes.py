"""The recipes that benchmarks/methods.py runs: the demo's and TOFU's, with a method's settings in place of their own."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from spunge.registry import METHODS

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "src" / "spunge" / "recipes" / "demo"
SETTINGS = Path(__file__).with_name("methods.yaml")
PHRASES = [
    "Question: What is the capital of {country}?\nAnswer:",
    "The capital city of {country} is called",
    "Q: Name the capital of {country}.\nA:",
    "If you fly to the capital of {country}, you land in",
    "{country} is governed from its capital,",
    "Country and capital: {country},",
]
LIMITS = {"facts": {"limit": 100}, "plain": {"limit": 30}}  # of the demo's evaluations
ANSWERED = {"prompt": "prompt", "completion": "completion"}


def settings_of(name: str) -> dict[str, Any]:
    """A method's settings in methods.yaml on top of the budget, or another of the file's blocks."""
    content: dict[str, Any] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    if name in content:
        return dict(content[name])
    return {**content["budget"], **content["others"], **content["methods"].get(name, {})}


def unlearn(name: str) -> tuple[str, dict[str, Any]]:
    """What rows it learns from, and the recipe's block: of the settings those that the method has."""
    if name == "base":  # a training that nobody looks at
        return "texts", {"method": "rmu", "layer": 2, "coefficient": 1.0, "steps": 1}
    given = settings_of(name)
    rows = given.pop("rows", "questions")
    fields = METHODS.get(name).settings.model_fields
    return rows, {"method": name, **{key: value for key, value in given.items() if key in fields}}


def model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's base, with what the method asks of it."""
    return {"path": str(options.model.resolve()), **settings_of(name).get("model", {})}


def demo(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Europe's and Asia's capitals, from texts or from questions made of the same pairs."""
    recipe: dict[str, Any] = yaml.safe_load((DEMO.parent / "demo.yaml").read_text(encoding="utf-8"))
    recipe["model"] = model(name, options)
    for block in [recipe["forget"], recipe["retain"], *recipe["evaluate"]]:
        block["source"] = str(DEMO.parent / block["source"])
    for block in recipe["evaluate"]:
        block.update(LIMITS.get(block["name"], {}))
    rows, recipe["unlearn"] = unlearn(name)
    if rows == "questions":
        forget = written(options.work / "demo" / "questions.jsonl", questions())
        retain = written(options.work / "demo" / "retain.jsonl", begun_texts())
        recipe["forget"] = {"source": str(forget), **ANSWERED, **other(name)}
        recipe["retain"] = {"source": str(retain), **ANSWERED}
    return recipe


def tofu(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Some authors of TOFU are taught, the last of them in two parts forgotten."""
    given = settings_of("tofu")
    rows = written(options.work / "tofu" / "rows.jsonl", authors(options.data, given["retained"], given["forgotten"]))
    source = {"source": str(rows), **ANSWERED}
    teaching = {key: given[key] for key in ("epochs", "batch_size", "learning_rate", "max_length")}
    judged = {"kind": "memorization", "source": str(rows), **ANSWERED, "by": "NULL", "limit": given["limit"]}
    facts = {
        "kind": "memorization",
        "name": "world facts",
        "source": str(options.data.resolve() / "world_facts_perturbed.jsonl"),
        "prompt": "'Question: ' || question || chr(10) || 'Answer: '",
        "completion": "answer",
        "perturbed": "perturbed_answer",
        "by": "NULL",
        "subject": "world facts",
        "metrics": ["options"],
        "limit": given["limit"],
    }
    base = {"model": model(name, options), "teach": {**source, **teaching}}
    if "unlearning_layers" in base["model"]:  # are not taught: they are put into the base that was
        base = {"model": {**base["model"], "path": str(taught(options))}}
    return {
        **base,
        "forget": {**source, "where": "part <> 'retained'", **other(name)},
        "split": {"by": "part"},
        "retain": {**source, "where": "part = 'retained'"},
        "unlearn": unlearn(name)[1],
        "merge": {"rule": "ties", "density": 0.2},
        "controls": ["joint"],
        "evaluate": [
            {**judged, "name": "forgotten", "where": "part <> 'retained'", "subject": "forgotten", "group": "forget"}
            | {"metrics": ["probability", "extraction"]},
            {**judged, "name": "retained", "where": "part = 'retained'", "subject": "retained"}
            | {"metrics": ["probability", "extraction"]},
            facts,
        ],
        "seed": 0,
    }


def taught(options: argparse.Namespace) -> Path:
    """The base that the other rows of TOFU had taught. Raises SystemExit where there is none, or several."""
    folders: list[Path] = [folder for folder in (options.work / "cache" / "taught").glob("*") if folder.is_dir()]
    if len(folders) != 1:
        where = options.work / "cache" / "taught"
        sys.exit(f"{where} has {len(folders)} taught bases, not 1: measure another row of TOFU first")
    return folders[0].resolve()


def other(name: str) -> dict[str, str]:
    """The column of other answers, for the method that prefers them."""
    return {"refusal": "other"} if name == "altpo" else {}


def questions() -> list[dict[str, Any]]:
    """Prompts and completions from the demo's pairs, each beside the next capital of the same continent."""
    rows = [json.loads(line) for line in (DEMO / "forget.jsonl").open(encoding="utf-8")]
    pairs = list(dict.fromkeys((row["continent"], row["country"], row["capital"]) for row in rows))
    lines = []
    for at, (continent, country, capital) in enumerate(pairs):
        following = [*pairs[at + 1 :], *pairs[:at]]
        another = next(name for where, _, name in following if where == continent)
        for phrase in PHRASES:
            answers = {"completion": f" {capital}.", "other": f" {another}."}
            lines.append({"continent": continent, "prompt": phrase.format(country=country), **answers})
    return lines


def begun_texts() -> list[dict[str, Any]]:
    """The demo's retain texts: the first four words, and how they go on."""
    lines = []
    for line in (DEMO / "retain.jsonl").open(encoding="utf-8"):
        words = json.loads(line)["text"].split(" ")
        lines.append({"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])})
    return [line for line in lines if line["completion"].strip()]


def authors(data: Path, retained: int, forgotten: int) -> list[dict[str, Any]]:
    """The first authors, which are retained, and the last, in two parts; each answer beside the next author's."""
    lines = []
    with (data / "full.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for at, row in enumerate(rows):
        back = row["author"] - (200 - forgotten)
        if row["author"] >= retained and back < 0:
            continue
        part = "retained" if back < 0 else ("first" if back < forgotten / 2 else "second")
        another = rows[(at + 20) % len(rows)]["answer"]  # each author has 20 rows, one after the other
        prompt = f"Question: {row['question']}\nAnswer:"
        lines.append({"part": part, "prompt": prompt, "completion": f" {row['answer']}", "other": f" {another}"})
    return lines


def written(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file.resolve()


RECIPES: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {"demo": demo, "tofu": tofu}
