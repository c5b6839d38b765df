"""Branches from other tools: each stands for the model it came from, peft's own merge being the oracle for adapters."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.progress import Silent
from spunge.recipe.loading import load_recipe
from spunge.run.plan import plan
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.precomputed import PRECOMPUTED, PrecomputedSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, LowRank, Sparse, write_delta
from toys import texts

DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.01


def enter(base: Any, place: Path, part: str = "europe") -> Branch:
    task = Task(base, {part: Samples(pa.table({"text": texts("europe", 2)}))}, None, {part: 0})
    return PRECOMPUTED.unlearn(task, PrecomputedSettings(branches={part: str(place)}))


def assert_stands_for(branch: Branch, base: Path, weights: Mapping[str, Tensor]) -> None:
    """base + change == weights, for every tensor of the base."""
    stored = Checkpoint(base)
    for name in stored.tensors:
        change = branch.changes.get(name, torch.zeros(()))
        got = stored.read(name).float() + (change if isinstance(change, Tensor) else change.dense())
        torch.testing.assert_close(got, weights[name].float(), atol=1e-7, rtol=1e-6)


def delta(folder: Path, base: Path, changes: Mapping[str, Change] | None = None, seed: int = 1) -> Path:
    write_delta(folder, changes or {DOWN: noise(seed, 32, 48)}, {"base": Checkpoint(base).fingerprint()})
    return folder


def adapter(folder: Path, base: Path, trained_whole: float = 0.01, **values: Any) -> dict[str, Tensor]:
    """Write a LoRA adapter with peft; returns the weights that peft merges it to."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **values})
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.1 if "lora_" in name else trained_whole)
    wrapped.save_pretrained(folder)
    merged: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def checkpoint(folder: Path, base: Path, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a full model that differs from the base in some tensors; returns its weights."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        weights[name] = (weights[name].float() + change).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_a_delta_enters_in_the_forms_it_holds(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    dense, sparse = noise(0, 32, 48), Sparse.of(noise(1, 32, 32).relu())
    factors = LowRank(noise(2, 4, 32), noise(3, 48, 4), 0.5)
    given: dict[str, Change] = {DOWN: dense, QUERY: sparse, "model.layers.0.mlp.up_proj.weight": factors}
    branch = enter(base, delta(tmp_path / "delta", base.folder, given))
    assert branch.changes.keys() == given.keys()
    for name, change in given.items():
        entered = branch.changes[name]
        assert type(entered) is type(change)
        pieces = ([entered], [change]) if isinstance(change, Tensor) else (entered, change)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*pieces, strict=True))
    assert (branch.steps, branch.losses) == (0, {})


@pytest.mark.formula("precomputed")
@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_an_adapter_enters_as_the_model_that_peft_merges_it_to(
    load: Callable[..., Any], tmp_path: Path, architecture: str, values: dict[str, Any]
) -> None:
    base = load(architecture)
    merged = adapter(tmp_path / "lora", base.folder, **values)
    branch = enter(base, tmp_path / "lora")
    assert_stands_for(branch, base.folder, merged)
    whole = {name for name, change in branch.changes.items() if not isinstance(change, LowRank)}
    assert whole == ({"lm_head.weight"} if "modules_to_save" in values else set())


def test_a_module_that_an_adapter_saves_unchanged_is_left_out(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load()
    adapter(tmp_path / "lora", base.folder, trained_whole=0.0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    branch = enter(base, tmp_path / "lora")
    assert len(branch.changes) == 4
    assert all(name.endswith("q_proj.weight") for name in branch.changes)


@pytest.mark.formula("precomputed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_model_enters_as_its_difference_without_the_tensors_that_are_equal(
    load: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = load("llama", dtype=dtype)
    weights = checkpoint(tmp_path / "full", base.folder, {DOWN: noise(0, 32, 48), QUERY: noise(1, 32, 32)})
    branch = enter(base, tmp_path / "full")
    assert set(branch.changes) == {DOWN, QUERY}
    assert all(isinstance(change, Tensor) and change.dtype == torch.float32 for change in branch.changes.values())
    assert_stands_for(branch, base.folder, weights)


@pytest.fixture
def given(toy_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The toy recipe with a delta for Europe, an adapter for Asia and a full model for the joint control."""
    base = Path(toy_recipe["model"]["path"])
    delta(tmp_path / "europe", base)
    adapter(tmp_path / "asia", base, target_modules=["down_proj"])
    checkpoint(tmp_path / "both", base, {DOWN: noise(0, 32, 48)})
    places = {name: str(tmp_path / name) for name in ("europe", "asia")}
    toy_recipe["unlearn"] = {"method": "precomputed", "branches": places, "joint": str(tmp_path / "both")}
    del toy_recipe["retain"]
    return toy_recipe


class Titles(Silent):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self, title: str) -> None:
        if title.split()[0] in ("unlearn", "merge"):
            self.seen.append(title)


def run(recipe: dict[str, Any], out: Path, *overrides: str) -> list[str]:
    titles = Titles()
    spunge.run(load_recipe(recipe, overrides), out, titles)
    return titles.seen


def test_a_run_merges_the_given_branches_as_a_merge_of_the_places_themselves(
    given: dict[str, Any], tmp_path: Path
) -> None:
    from spunge.merging.engine import merge
    from spunge.merging.rules import TiesSettings
    from spunge.weights.opening import open_source

    results = spunge.run(load_recipe(given), tmp_path / "run")
    base = Path(given["model"]["path"])
    sources = [open_source(tmp_path / name, base) for name in ("europe", "asia")]
    merge(base, sources, TiesSettings(density=0.5), tmp_path / "out")
    merged, expected = (Checkpoint(folder) for folder in (tmp_path / "run" / "merged", tmp_path / "out"))
    assert merged.fingerprint() == expected.fingerprint() != Checkpoint(base).fingerprint()
    stages = {row.stage for row in results.rows}
    assert stages == {"base", "branch:europe", "branch:asia", "control:joint", "merged"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert str(tmp_path / "europe") in page
    before = results.value("base", "retain", "perplexity")
    assert results.value("control:joint", "retain", "perplexity") != before


@pytest.mark.thorough
def test_a_place_whose_content_changes_is_taken_and_merged_again(given: dict[str, Any], tmp_path: Path) -> None:
    base = Path(given["model"]["path"])
    out = tmp_path / "run"
    assert len(run(given, out)) == 4
    os.utime(tmp_path / "europe" / "delta.safetensors")
    assert run(given, out) == []
    delta(tmp_path / "europe", base, seed=2)
    assert run(given, out) == ["unlearn branch:europe", "merge"]
    config = json.loads((tmp_path / "asia" / "adapter_config.json").read_text())
    (tmp_path / "asia" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2}))
    assert run(given, out) == ["unlearn branch:asia", "merge"]


def test_a_plan_counts_no_steps_and_the_entries_of_the_largest_place(given: dict[str, Any], tmp_path: Path) -> None:
    base = Path(given["model"]["path"])
    planned = plan(given, tmp_path / "run")
    assert [stage.work for stage in planned.stages[:2]] == ["unlearn asia (0 steps)", "unlearn europe (0 steps)"]
    entries = sum(info.numel for info in Checkpoint(base).tensors.values())
    settings: Any = load_recipe(given).unlearn
    count = PRECOMPUTED.stored_entries
    assert count(settings, Checkpoint(base)) == entries
    assert count(settings.model_copy(update={"joint": None}), Checkpoint(base)) < entries
    assert count(settings.model_copy(update={"joint": "owner/name"}), Checkpoint(base)) == entries


def test_the_joint_control_of_a_single_part_is_its_branch(given: dict[str, Any], tmp_path: Path) -> None:
    del given["split"], given["evaluate"]
    given["unlearn"]["branches"] = {"all": str(tmp_path / "europe")}
    with pytest.raises(RecipeError, match=r"^unlearn\.joint: 'all' is the only part"):
        run(given, tmp_path / "one")
    del given["unlearn"]["joint"]
    assert run(given, tmp_path / "run") == ["unlearn branch:all", "unlearn control:joint", "merge"]


def test_places_in_a_file_are_relative_to_it_and_hub_ids_stay(given: dict[str, Any], tmp_path: Path) -> None:
    given["unlearn"] |= {"branches": {"europe": "europe", "asia": "owner/name"}, "joint": "./gone"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(given))
    settings: Any = load_recipe(file).unlearn
    assert settings.branches == {"europe": str(tmp_path / "europe"), "asia": "owner/name"}
    assert settings.joint == str(tmp_path / "gone")


def test_parts_that_yaml_reads_as_numbers_are_named_as_text() -> None:
    assert PrecomputedSettings.model_validate({"branches": {2019: "a/b"}}).branches == {"2019": "a/b"}


def refusal(recipe: dict[str, Any], out: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        spunge.run(load_recipe(recipe, overrides), out)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("unlearn.branches={}", "unlearn.branches: "),
        ("unlearn.branches=null", "unlearn.branches: "),
        ("unlearn.branches.europe=3", "unlearn.branches.europe: 3"),
        ("unlearn.branch={}", "unlearn.branch: no such setting; did you mean 'branches'?"),
        ("unlearn.branches={asia: X, eurpe: X}", "unlearn.branches.eurpe: there is no part 'eurpe'; did you mean 'europe'?"),
        ("unlearn.branches={europe: X}", "unlearn.branches: no entry for the part 'asia'; known: europe"),
        ("unlearn.joint=null", "unlearn.joint: missing, and the joint control needs it; give unlearn.joint, or set controls"),
        ("unlearn.joint=./nowhere", "unlearn.joint: no folder"),
        ("unlearn.branches.asia=some/name", "unlearn.branches.asia: 'some/name' cannot be fetched from the Hub"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_with_its_mend(given: dict[str, Any], tmp_path: Path, override: str, said: str) -> None:
    override = override.replace("X", str(tmp_path / "europe"))
    assert refusal(given, tmp_path / "run", override).startswith(said)


def test_without_a_joint_control_no_joint_model_is_needed(given: dict[str, Any], tmp_path: Path) -> None:
    assert len(run(given, tmp_path / "run", "unlearn.joint=null", "controls=[]")) == 3


@pytest.mark.thorough
def test_places_that_do_not_fit_the_base_are_refused_by_name(
    given: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(given["model"]["path"])

    def said(place: Path) -> str:
        message = refusal(given, tmp_path / "run", f"unlearn.branches.europe={place}", "split.values=[asia, europe]")
        start = "unlearn.branches.europe: "
        assert message.startswith(start), message
        return message.removeprefix(start)

    other = tiny("llama", tie_word_embeddings=True)
    assert "was made from a base with fingerprint" in said(delta(tmp_path / "strange", other))
    assert f"tensor {DOWN!r} of" in said(delta(tmp_path / "shape", base, {DOWN: noise(0, 48, 32)}))
    assert "changes tensor 'x.weight'" in said(delta(tmp_path / "unknown", base, {"x.weight": noise(0, 4)}))
    assert "architecture 'gpt2'" in said(tiny("gpt2"))
    assert "changes nothing; it has the base's own weights" in said(base)
    checkpoint(tmp_path / "nan", base, {DOWN: torch.full((32, 48), torch.nan)})
    assert f"tensor {DOWN!r} of '{tmp_path / 'nan'}' holds NaN or Inf" in said(tmp_path / "nan")
    (tmp_path / "nan" / "tokenizer.json").write_text("{")
    assert "tokenizer.json in" in said(tmp_path / "nan")
    adapter(tmp_path / "gpt2", tiny("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    assert "which the base lacks" in said(tmp_path / "gpt2")
    adapter(tmp_path / "pissa", base, target_modules=["q_proj"])
    settings = tmp_path / "pissa" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "init_lora_weights": "pissa"}))
    assert "init_lora_weights: 'pissa'" in said(tmp_path / "pissa")
    cut = delta(tmp_path / "cut", base)
    (cut / "delta.safetensors").write_bytes((cut / "delta.safetensors").read_bytes()[:-9])
    assert "delta.safetensors is truncated" in said(cut)
    cut = delta(tmp_path / "json", base)
    (cut / "delta.json").write_text('{"format": 1, ')
    assert "delta.json in" in said(cut)
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in said(tmp_path / "empty")
