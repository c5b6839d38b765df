"""A run on a quantised base: refused before anything is trained, or done on the values that it stands for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quantising
from spunge.errors import RecipeError
from spunge.run.pipeline import run
from spunge.run.verify import verify


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], tokenizer_folder: Path, tmp_path: Path) -> dict[str, Any]:
    quantising.model("llama", tmp_path / "plain")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "plain" / file.name)
    quantising.quantise(tmp_path / "plain", tmp_path / "fp8")
    model = {"path": str(tmp_path / "fp8"), "dtype": "float32"}
    return {**toy_recipe, "model": model, "unlearn": {**toy_recipe["unlearn"], "layer": 1}, "controls": []}


def test_a_quantised_base_is_refused_before_anything_is_trained(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^model\.path: .* is quantised \(fp8.*or set model\.dequantize=true"):
        run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_quantised_base_is_unlearned_by_the_values_that_it_stands_for(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["model"]["dequantize"] = True
    run(recipe, tmp_path / "run")
    merged = tmp_path / "run" / "merged"
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("is quantised (fp8" in note for note in json.loads((merged / "merge.json").read_text())["notes"])
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(merged).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("down_proj" in name for name in changed)
    assert run(recipe, tmp_path / "run").folder == tmp_path / "run"  # the conversion is vouched for, and not made again
    checked = verify(tmp_path / "run")
    assert (checked.problems, checked.notes) == ([], [])
    assert checked.tensors == len(after)
