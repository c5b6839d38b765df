"""Runs that train unlearning layers (EUL): what they change, how the layers are fused, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import spunge
from spunge.errors import RecipeError
from spunge.merging.measuring import rows_of
from spunge.model.layered import layered
from spunge.model.loading import Base, load_base
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings, UnlearningLayers
from spunge.registry import METHODS
from spunge.run.plan import plan
from spunge.run.stages.building import build
from spunge.run.verify import verify
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.delta import open_delta
from spunge.weights.gguf_model import opened
from spunge.weights.overlay import applied
from spunge.weights.unlearning_layers import INSIDE

EUL = {"method": "eul", "steps": 3, "batch_size": 4, "learning_rate": 0.02}


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    model = {**toy_recipe["model"], "unlearning_layers": {"size": 3, "activation": "gelu"}}
    merge = {"rule": "regmean", "alpha": 1}
    own = {"model": model, "unlearn": EUL, "merge": merge, "controls": []}
    return {**toy_recipe, **own, "evaluate": toy_recipe["evaluate"][1:]}


def inputs_of(base: Base, name: str, texts: Any) -> torch.Tensor:  # (tokens, inputs) float64
    """What a linear layer reads of some rows, one by one."""
    read: list[torch.Tensor] = []
    layer = base.model.get_submodule(name.removesuffix(".weight"))
    hook = layer.register_forward_pre_hook(lambda _layer, given: read.append(given[0][0].double()))
    for row in rows_of([texts], base, 1000, 512):
        with torch.no_grad():
            base.model(input_ids=torch.tensor([row.ids]))
    hook.remove()
    return torch.cat(read)


def test_the_layers_alone_are_trained_and_their_fusion_is_the_least_squares_on_their_own_inputs(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    read = load_recipe(recipe)
    results = spunge.run(read, out)
    assert {row.stage for row in results.rows} == {"base", "merged", "branch:europe", "branch:asia"}
    begun = build(read, out).base
    stored = Checkpoint(begun.folder)
    base = load_base(begun.folder, ModelSettings(path=str(begun.folder), dtype="float32"))
    parts = {part.value: part.samples for part in begun.parts.parts}
    names = [name for name in stored.tensors if f".{INSIDE}." in name]
    known: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    for value, samples in parts.items():
        delta = open_delta(out / "branches" / value)
        assert sorted(delta.tensors) == sorted(names)
        with applied(base.parameters, delta):
            for name in names:
                own = base.model.get_parameter(name).detach().double().clone()
                known[name].append((own, inputs_of(base, name, samples)))
    merged = Checkpoint(out / "merged")
    for name, branches in known.items():
        middle = torch.stack([weight for weight, _ in branches]).mean(0)
        read_by = torch.cat([x / len(x) ** 0.5 for _, x in branches])
        wanted = torch.cat([x @ (weight - middle).T / len(x) ** 0.5 for weight, x in branches])
        fused = middle + torch.linalg.lstsq(read_by, wanted, driver="gelsd").solution.T
        torch.testing.assert_close(merged.read(name).double(), fused, rtol=1e-3, atol=1e-5)
        assert not torch.equal(merged.read(name), stored.read(name))
    assert all(torch.equal(merged.read(name), stored.read(name)) for name in stored.tensors if name not in names)
    assert verify(out).problems == []
    # transformers takes it for no model without the layers, and no other program for one that it knows.
    card = (out / "merged" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert read_config(out / "merged")["model_type"] == "llama_with_unlearning_layers"
    with pytest.raises(RecipeError, match="--gguf"):
        opened(out / "merged", {})
    # Further layers are trained where these are.
    again = {**recipe, "model": {"path": str(out / "merged"), "dtype": "float32"}}
    assert build(load_recipe(again), tmp_path / "again").base.folder == out / "merged"


@pytest.mark.thorough
def test_a_plan_counts_the_layers_with_the_base_and_stores_them_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    planned = plan(load_recipe(recipe), tmp_path / "run")
    assert planned.memory
    assert not planned.refused
    begun = build(load_recipe(recipe), tmp_path / "run").base
    stored = Checkpoint(begun.folder)
    entries = METHODS.get("eul").stored_entries(begun.recipe.unlearn, stored)
    assert entries == 4 * 2 * 3 * 32 == sum(info.numel for name, info in stored.tensors.items() if INSIDE in name)


def test_a_base_without_layers_is_refused_before_anything_is_made(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["model"]["unlearning_layers"]
    with pytest.raises(RecipeError, match=r"unlearn\.method: eul trains unlearning layers, and the base has none"):
        spunge.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode": {"path": "large", "through": "alone"}, "merge": {"rule": "ties"}}, "beside decode"),
        ({"model": {"path": "m", "train_in": "4bit", "unlearning_layers": {}}}, "train_in"),
        ({"execution": {"kind": "sharded", "processes": 2}}, "eul does not train in several processes together"),
        ({"unlearn": None, "judge": []}, "nothing is unlearned"),
        ({"teach": {"source": "rows.jsonl", "epochs": 1}}, "beside teach they would be taught too"),
    ],
)
def test_what_does_not_know_layers_is_refused_with_the_recipe(
    recipe: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        spunge.run({**recipe, **changes}, tmp_path)


def test_vllm_is_refused_beside_layers(recipe: dict[str, Any], toy_recipe: dict[str, Any]) -> None:
    source = toy_recipe["forget"]["source"]
    written = {"kind": "toxicity", "source": source, "generation": {"engine": "vllm"}}
    with pytest.raises(RecipeError, match=r"model\.unlearning_layers: vllm does not know them"):
        load_recipe({**recipe, "evaluate": [written]})


def test_lora_is_trained_by_the_same_loss_where_it_is_asked_for(
    tiny: Callable[..., Path], toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe({**toy_recipe, "unlearn": {**EUL, "trainable": {"kind": "lora"}}})
    assert build(recipe, tmp_path).base.folder == tiny("llama")


def test_without_its_own_code_transformers_does_not_load_a_model_with_layers(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layered(tiny("llama"), UnlearningLayers())
    # As in a process that knows nothing of this package.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llama_with_unlearning_layers")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
