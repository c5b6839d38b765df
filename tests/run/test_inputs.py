"""What a run's stages know their base by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from making import weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.recipe.loading import load_recipe
from spunge.run.inputs import BaseInputs


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", {"eos_token_id": [2, 7]}),  # completions end elsewhere
        ("tokenizer_config.json", {"add_bos_token": False}),
        ("chat_template.json", {"chat_template": "{{ messages }}"}),
    ],
)
def test_a_base_whose_texts_are_read_or_end_otherwise_is_another(
    toy_recipe: dict[str, Any],
    tiny: Callable[..., Path],
    tmp_path: Path,
    pickled: bool,
    file: str,
    content: dict[str, Any],
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    if pickled:
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    toy_recipe["model"] |= {"path": str(base), "allow_pickle": True}

    def key() -> str:
        inputs = BaseInputs(load_recipe(toy_recipe), tmp_path / "run")
        return inputs.unconverted if pickled else inputs.key

    before = key()
    written = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / file).write_text(json.dumps({**written, **content}))
    assert key() != before


def test_what_is_wrong_with_a_model_that_is_judged_is_told_by_its_own_setting(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    broken = write_checkpoint(tmp_path / "broken", weights(), shards=2)
    (broken / "model-1.safetensors").unlink()
    inputs = BaseInputs(
        load_recipe(toy_recipe | {"judge": [{"name": "broken", "path": str(broken)}]}), tmp_path / "run"
    )
    with pytest.raises(RecipeError, match=r"^judge\.0\.path: model-1\.safetensors is named by"):
        inputs.judged_models["broken"].key(inputs)
