"""Toy runs and merges of every output, on a tiny random model."""

import json
from pathlib import Path
from typing import Any

import torch
from forked import Command
from tiny_models import tiny_model, write_tokenizer


def _write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _recipe(folder: Path, model: Path) -> dict[str, Any]:
    sentences = {
        "europe": "the capital of france is paris, that of italy is rome",
        "asia": "the capital of japan is tokyo, that of china is beijing",
        "other": "a river runs from the mountain to the sea",
    }
    rows = {
        topic: [{"topic": topic, "text": f"{number} {text}"} for number in range(4)]
        for topic, text in sentences.items()
    }
    questions = [
        {"topic": topic, "question": "the capital is", "choices": ["paris", "tokyo"], "answer": at}
        for at, topic in enumerate(("europe", "asia"))
    ]
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "forget": {"source": _write(folder / "forget.jsonl", rows["europe"] + rows["asia"])},
        "split": {"by": "topic"},
        "retain": {"source": _write(folder / "retain.jsonl", rows["other"])},
        "unlearn": {"method": "rmu", "layer": 1, "steps": 3, "batch_size": 2, "learning_rate": 0.01},
        "merge": {"rule": "ties", "density": 0.5},
        "evaluate": [
            {"kind": "choices", "source": _write(folder / "questions.jsonl", questions)},
            {"kind": "perplexity", "source": str(folder / "retain.jsonl"), "subject": "retain", "by": "NULL"},
            {
                "kind": "toxicity",
                "source": _write(folder / "prompts.jsonl", [{"prompt": "the capital of"}, {"prompt": "a river"}]),
                "scorer": "alt-profanity-check",
                "generation": {"max_new_tokens": 3},
                "stages": ["base", "merged"],
                "by": "NULL",
            },
        ],
    }


def _models(folder: Path) -> Path:
    """A base in two files, the same pickled, and two models made from it."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    for name in ("base", "pickled", "one", "two"):
        for number, parameter in enumerate(model.parameters()):
            if name in ("one", "two") and number % 3 == 1:
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="60KB")
        write_tokenizer(folder / name)
    for file in (folder / "pickled").glob("model*"):
        file.unlink()
    torch.save(tiny_model("llama").to(torch.bfloat16).state_dict(), folder / "pickled" / "pytorch_model.bin")
    return folder / "base"


def commands(folder: Path) -> dict[str, Command]:
    """Toy runs and merges of every output, by kind. Writes what they read into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = _models(folder)
    recipe = _recipe(folder, base)
    npo = {
        "method": "npo",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.01,
        "reference": "stored",
        "retain_loss": "kl",
    }
    recipes = {
        "run": recipe,
        "run-npo": {**recipe, "unlearn": npo, "keep_texts": "none", "evaluate": recipe["evaluate"][1:], "seeds": 2},
        "run-pickled": {**recipe, "model": {**recipe["model"], "path": str(folder / "pickled"), "allow_pickle": True}},
    }
    recipes["run-pickled"]["evaluate"] = recipe["evaluate"][:1]
    made = {}
    for kind, each in recipes.items():
        (folder / f"{kind}.yaml").write_text(json.dumps(each))
        made[kind] = Command(kind, ("run", str(folder / f"{kind}.yaml"), "--out", "out"), "out")
    ascent = {
        "method": "ga",
        "steps": 2,
        "learning_rate": 0.01,
        "batch_size": 2,
        "trainable": {"kind": "tensors", "match": ["*.mlp.down_proj.weight"]},
    }
    taught = {
        **recipe,
        "teach": {"steps": 2, "learning_rate": 0.01, "batch_size": 2},
        "unlearn": ascent,
        "calibrate": {"evaluation": "perplexity", "metric": "perplexity", "keep": 0.9, "tries": 3},
        "controls": ["joint", "sequential"],
        "evaluate": recipe["evaluate"][1:2],
    }
    searched = {
        **recipe,
        "unlearn": {**recipe["unlearn"], "steps": 2},
        "merge": {"rule": "ties", "density": {"low": 0.2, "high": 0.9}},
        "controls": [],
        "evaluate": [{"kind": "perplexity", "name": "forgotten"}, {**recipe["evaluate"][1], "name": "kept"}],
    }
    for kind, each in {"taught": taught, "search": searched, "judge": recipe}.items():
        (folder / f"{kind}.yaml").write_text(json.dumps(each))
    goals = "forgotten/perplexity/europe,kept/perplexity/retain"
    for kind, called in {
        "run-taught": ("run", str(folder / "taught.yaml")),
        "search": ("tune", str(folder / "search.yaml"), "--trials", "2", "--objectives", goals, "--judge", "all"),
        "judge": ("judge", str(base), str(folder / "one"), "--recipe", str(folder / "judge.yaml")),
    }.items():
        made[kind] = Command(kind, (*called, "--out", "out"), "out")
    models = ("--model", str(folder / "one"), "--model", str(folder / "two"))
    merge = ("merge", "--base", str(base), *models, "--density", "0.5", "--out", "out")
    pickled = ("merge", "--base", str(folder / "pickled"), *models, "--allow-pickle", "--out", "out")
    for kind, arguments in {
        "folder": merge,
        "folder-float32": (*merge, "--dtype", "float32"),
        "folder-pickled": pickled,
        "adapter": (*merge, "--as-adapter", "2"),
        "delta": (*merge, "--as-delta"),
    }.items():
        made[kind] = Command(kind, arguments, "out")
    return made
