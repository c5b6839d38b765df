"""Runs whose merge rule needs second moments of the branches: which stages, what they depend on, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import spunge
from spunge.errors import RecipeError
from spunge.merging.command import merge_command
from spunge.merging.tensors import merge_tensors
from spunge.progress import Silent
from spunge.recipe.loading import load_recipe
from spunge.registry import RULES
from spunge.run.stages.building import build
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import open_delta
from spunge.weights.moments import moments_of
from spunge.weights.sources import DeltaSource

MERGE = "merge={rule: regmean, moments: {rows: 4, max_length: 16}}"
CONTROL = "controls=[{name: weighed, merge: {rule: fisher, moments: {rows: 2, max_length: 16}}}]"


class Told(Silent):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def begin(self, title: str) -> None:
        self.titles.append(title)

    def made(self) -> list[str]:
        return [title for title in self.titles if title.startswith(("unlearn", "take moments", "merge"))]


def run(recipe: dict[str, Any], out: Path, *overrides: str) -> list[str]:
    told = Told()
    spunge.run(load_recipe(recipe, overrides), out, told)
    return told.made()


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    return {**toy_recipe, "evaluate": toy_recipe["evaluate"][1:]}


def test_moments_are_stages_of_their_own_that_a_merge_waits_for(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = run(recipe, out, MERGE, CONTROL)
    moments = [title for title in made if title.startswith("take")]
    assert len(moments) == 4  # two kinds of two branches
    assert made.index(moments[-1]) < made.index("merge")
    # The merged checkpoint is the rule on what the stages left.
    branches = [DeltaSource(open_delta(out / "branches" / slug)) for slug in ("asia", "europe")]
    taken = [moments_of(each, "inputs", {"rows": 4, "max_length": 16}, "regmean") for each in branches]
    base, merged = Checkpoint(Path(recipe["model"]["path"])), Checkpoint(out / "merged")
    names = list(branches[0].names)
    assert names
    for name in names:
        deltas = torch.stack([each.delta.dense(name) for each in branches])
        size = deltas.shape[-1]
        grams = [each.of(name).reshape(size, size) for each in taken]
        expected = merge_tensors(RULES.get("regmean"), deltas, RULES.get("regmean").settings(), moments=grams)
        torch.testing.assert_close(merged.read(name), base.read(name) + expected, rtol=1e-5, atol=1e-7)
    # Another weight off the diagonal takes nothing again; other rows do, and nothing is trained for it.
    assert run(recipe, out, MERGE.replace("regmean,", "regmean, alpha: 0.5,"), CONTROL) == ["merge"]
    again = run(recipe, out, MERGE.replace("rows: 4", "rows: 3"), CONTROL)
    assert [title.split()[0] for title in again] == ["take", "take", "merge"]
    # `spunge merge` takes the branches of such a run with what it left beside them.
    places = [str(out / "branches" / slug) for slug in ("asia", "europe")]
    settings = {"moments": {"rows": 4, "max_length": 16}}
    merge_command(tmp_path / "out", str(base.folder), places, rule="regmean", settings=settings)
    for name in names:
        deltas = Checkpoint(tmp_path / "out").read(name) - base.read(name)
        assert bool(deltas.any())
    with pytest.raises(RecipeError, match=r"no moments-inputs-.*json; a run that merges by 'regmean'"):
        merge_command(tmp_path / "no", str(base.folder), places, rule="regmean")


def test_a_damaged_file_of_moments_is_taken_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe, out, MERGE)
    [file] = (out / "branches" / "asia").glob("moments-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run(recipe, out, MERGE)[0] == "take moments of branch:asia"


def test_moments_are_the_small_models_own_where_it_shifts_a_larger_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    decode = f"decode={{path: {recipe['model']['path']}, alpha: 2, through: alone}}"
    run(recipe, tmp_path / "plain", MERGE, CONTROL)
    run(recipe, tmp_path / "shifts", MERGE, CONTROL, decode)
    files = [file.relative_to(tmp_path / "plain") for file in (tmp_path / "plain").rglob("moments-*")]
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "shifts" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_models_that_began_from_one_another_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    control = "controls=[{name: chain, train: sequential, merge: {rule: fisher}}]"
    with pytest.raises(RecipeError, match="began from one another"):
        spunge.run(load_recipe(recipe, [control]), tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()


def test_moments_are_refused_beside_a_device_map(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["model"]["device_map"], recipe["merge"] = "auto", {"rule": "fisher"}
    with pytest.raises(RecipeError, match=r"^model\.device_map: rule .* takes moments of the weights themselves"):
        spunge.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()


def test_a_whole_model_without_moments_is_refused_in_one_line(recipe: dict[str, Any], tmp_path: Path) -> None:
    base = recipe["model"]["path"]
    for rule in ("fisher", "regmean"):
        with pytest.raises(RecipeError, match=f"{rule!r} needs second moments of .* is no branch of a run"):
            merge_command(tmp_path / "out", base, [base], rule=rule)
    assert not (tmp_path / "out").exists()


def test_moments_are_planned_with_their_memory_and_their_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    begun = build(load_recipe(recipe, [MERGE, CONTROL]), tmp_path)
    costs = {name: stage.cost() for name, stage in begun.graph.stages.items() if name.startswith("moments:")}
    inputs = next(cost for name, cost in costs.items() if "inputs" in name)
    gradients = next(cost for name, cost in costs.items() if "gradients" in name)
    # Three output projections of (32, 48).
    assert (inputs.held, inputs.kept) == (4 * 3 * 48 * 48, 4 * 3 * 48 * 48)
    assert (gradients.held, gradients.kept) == (8 * 3 * 32 * 48, 4 * 3 * 32 * 48)
    assert begun.graph.stages["merged"].cost().held > 0
