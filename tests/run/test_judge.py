"""Judging: what scores depend on, what is kept of them, and the base's scores that other runs take over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import spunge
from picked import few
from spunge.evaluation.evaluator import Measure, Rated
from spunge.files import cache_folder
from spunge.progress import SILENT
from spunge.recipe.loading import load_recipe
from spunge.run.measured import Measured, from_json, to_json
from spunge.run.session import Session
from spunge.run.stages.building import build
from spunge.run.stages.judging import judging_name
from toys import Told


def keys(recipe: dict[str, Any], folder: Path, *overrides: str) -> dict[str, str]:
    """Title of every judging -> its key."""
    run = build(load_recipe(recipe, overrides), folder)
    names = [judging_name(judging) for judging in run.judgings[0]]
    return {run.graph.stages[name].title: run.graph.key(name) for name in names}


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        ("evaluate.0.normalize=characters", {"choices"}),
        ("evaluate.0.limit=2", {"choices"}),
        ("evaluate.0.stages=[base, merged]", set()),
        ("evaluate.1.max_length=9", {"perplexity"}),
        ("published=[]", set()),
    ],
)
def test_scores_depend_on_their_own_evaluation_alone(
    toy_recipe: dict[str, Any], tmp_path: Path, edit: str, changes: set[str]
) -> None:
    before, after = keys(toy_recipe, tmp_path), keys(toy_recipe, tmp_path, edit)
    differing = {title.partition(": ")[2] for title in after if before[title] != after[title]}
    assert differing == changes


def test_scores_of_the_base_do_not_depend_on_how_it_is_unlearned(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    before, after = keys(toy_recipe, tmp_path), keys(toy_recipe, tmp_path, "unlearn.alpha=7", "merge.scale=2")
    same = {title for title in after if before[title] == after[title]}
    assert same == {"judge base: choices", "judge base: perplexity"}


def test_what_compares_with_the_bases_texts_depends_on_the_base_and_nothing_else_of_another_model_does(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    similar = {"kind": "similarity", "prompt": "text", "encoder": str(tiny_bert)}
    toy_recipe["evaluate"].append(similar)
    toy_recipe["evaluate"].append({"kind": "audit", "of": "similarity", "attack": "quantise", "stages": ["model:*"]})
    toy_recipe["judge"] = [{"name": "other", "path": str(tiny("gpt2"))}]
    before = keys(toy_recipe, tmp_path)
    toy_recipe["model"] = {**toy_recipe["model"], "path": str(tiny("qwen2"))}
    after = keys(toy_recipe, tmp_path)
    of_other = {title for title in after if "model:other" in title}
    assert len(of_other) == 4
    differing = {title.partition("other: ")[2] for title in of_other if before[title] != after[title]}
    assert differing == {"similarity", *(title.partition("other: ")[2] for title in of_other if "quantise" in title)}


def test_an_audit_depends_on_the_rows_and_on_what_it_measures_again(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["evaluate"].append({"kind": "audit", "of": "choices", "attack": "relearn", "stages": ["base"]})
    [audit] = [title for title in keys(toy_recipe, tmp_path) if "relearn" in title]
    before = keys(toy_recipe, tmp_path)[audit]
    assert keys(toy_recipe, tmp_path, "evaluate.0.normalize=characters")[audit] != before
    assert keys(toy_recipe, tmp_path, "retain.limit=3")[audit] != before
    assert keys(toy_recipe, tmp_path, "evaluate.1.max_length=9")[audit] == before


def test_measures_are_kept_to_the_bit() -> None:
    numbers = np.array([1 / 3, np.nan, np.inf, 1e-300, 0.1 + 0.2])
    measure = Measure("m", numbers, np.ones(5), higher="bad", transform="exp", chance=0.25, side=True)
    told = Measured([measure], [Rated(0.5, 0.1, 0.9, 5)], "cpu", "float32")
    read = from_json(json.loads(json.dumps(to_json("base", "e", told))))
    assert (read.rated, read.device, read.dtype) == (told.rated, "cpu", "float32")
    [again] = read.measures
    assert again.numerator.tobytes() == numbers.tobytes()
    rest = {name: value for name, value in vars(measure).items() if not isinstance(value, np.ndarray)}
    assert {name: vars(again)[name] for name in rest} == rest


def test_measures_that_a_version_before_directions_kept_are_read() -> None:
    measure = Measure("perplexity of it", np.ones(2), np.ones(2), higher="unknown", of="perplexity")
    content = to_json("base", "e", Measured([measure], []))
    del content["measures"][0]["higher"]
    content["measures"][0]["higher_is_better"] = False
    assert from_json(content).measures[0].higher == "unknown"


@pytest.mark.thorough
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "deleted"])
def test_a_damaged_cache_is_not_believed(toy_recipe: dict[str, Any], tmp_path: Path, damage: str) -> None:
    toy_recipe["controls"] = []
    toy_recipe["evaluate"] = [
        {
            "kind": "toxicity",
            "prompt": "text",
            "scorer": "alt-profanity-check",
            "generation": {"max_new_tokens": 2},
            "limit": 2,
            "stages": ["base"],
        }
    ]
    first = spunge.run(load_recipe(toy_recipe), tmp_path / "one")
    for file in [file for file in cache_folder().rglob("base/*/*") if file.is_file()]:
        data = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            file.write_bytes({"cut": data[:middle], "flipped": flipped, "emptied": b""}[damage])
    second = spunge.run(load_recipe(toy_recipe, ["unlearn.alpha=7"]), tmp_path / "two")
    assert second.rows == first.rows
    texts = [sorted((tmp_path / name).rglob("texts-*.jsonl"))[0].read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_a_model_that_would_be_written_otherwise_writes_its_texts_anew(
    toy_recipe: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = toy_recipe["evaluate"][0]["source"]
    said = {
        "kind": "match",
        "source": source,
        "prompt": "question",
        "words": ["a"],
        "generation": {"max_new_tokens": 2},
    }
    toy_recipe |= {"evaluate": [said | {"stages": ["base", "branch:asia", "control:joint"]}], "controls": ["joint"]}
    toy_recipe["model"] = {"path": str(tiny("llama", dtype=torch.bfloat16))}  # written in float32, all are judged in it
    for count, dtype in enumerate(["base", "float32"], 1):
        spunge.run(load_recipe(toy_recipe, [f"merge.dtype={dtype}"]), tmp_path / "run")
        for stage in ("base", "branch-asia", "control-joint"):
            assert len(list((tmp_path / "run" / "evaluation" / stage).glob("texts-*.jsonl"))) == count


def test_a_completion_that_was_tampered_with_is_written_again(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """The scores' stamp is gone, as after a kill: what is left of the texts must not be taken up unchecked."""
    toy_recipe["controls"] = []
    toy_recipe["evaluate"] = [
        {
            "kind": "toxicity",
            "prompt": "text",
            "scorer": "alt-profanity-check",
            "generation": {"max_new_tokens": 2},
            "limit": 2,
            "stages": ["merged"],
        }
    ]
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    [file] = (tmp_path / "run" / "evaluation" / "merged").glob("texts-*.jsonl")
    whole = file.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    lines[0]["texts"] = ["something else"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stamp in (tmp_path / "run" / "stamps" / "judge").rglob("*.json"):
        stamp.unlink()
    spunge.run(load_recipe(toy_recipe), tmp_path / "run")
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("stored", "overrides", "wanted"),
    few(
        [
            (torch.bfloat16, ["merge.dtype=float32"], torch.float32),
            (torch.bfloat16, [], torch.bfloat16),
            (torch.float32, [], torch.float32),
            (torch.float32, ["merge.dtype=bfloat16"], torch.bfloat16),
            (torch.bfloat16, ["merge.dtype=float32", "model.dtype=bfloat16"], torch.bfloat16),
        ],
        0,
        1,
    ),
)
def test_models_are_judged_with_the_values_of_their_file_in_the_arithmetic_that_holds_them(
    toy_recipe: dict[str, Any],
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    overrides: list[str],
    wanted: torch.dtype,
) -> None:
    monkeypatch.setattr("spunge.model.loading.bfloat16_speedup", lambda: 2.0)
    toy_recipe |= {
        "model": {"path": str(tiny("llama", dtype=stored))},
        "controls": [],
        "evaluate": toy_recipe["evaluate"][1:],
    }
    recipe = load_recipe(toy_recipe, ["unlearn.steps=1", *overrides])
    results = spunge.run(recipe, tmp_path / "run")
    assert f"torch.{results.dtype}" == str(wanted)
    run = build(recipe, tmp_path / "run")
    opened = Session(run.base, SILENT)
    assert opened.base.dtype == torch.bfloat16  # what it is trained in
    shown = opened.show(run.seeds[0].models[-1])
    assert shown.dtype == wanted
    held = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert all(torch.equal(shown.parameters[name].cpu(), tensor.to(wanted)) for name, tensor in held.items())
    said = [note for note in run.seeds[0].inputs.notes if note.startswith("model.dtype: bfloat16")]
    assert len(said) == ("model.dtype=bfloat16" in overrides)


@pytest.mark.thorough
def test_the_bases_scores_are_taken_only_from_a_run_of_the_same_versions(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torch may give other last bits, which a comparison with the base would take for an effect."""
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache"))
    toy_recipe["evaluate"] = toy_recipe["evaluate"][:1]

    def outcomes(name: str) -> list[str]:
        watcher = Told()
        spunge.run(load_recipe(toy_recipe), tmp_path / name, watcher)
        return watcher.lines

    assert "from the cache" not in outcomes("first")
    assert "from the cache" in outcomes("second")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert "from the cache" not in outcomes("third")
