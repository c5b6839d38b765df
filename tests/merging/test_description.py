"""The merged folder's config.json says what its weights are, and transformers loads them by it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from making import noise
from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import AverageSettings, DareTiesSettings, TaskArithmeticSettings
from spunge.model.loading import load_base
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import WHOLE
from spunge.weights.opening import open_source

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def changed(folder: Path, out: Path, config: dict[str, Any], **values: torch.Tensor) -> Path:
    shutil.copytree(folder, out)
    tensors = {**load_file(folder / WHOLE), **values}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, out / WHOLE, metadata={"format": "pt"})
    content = {**json.loads((out / "config.json").read_text()), **config}
    (out / "config.json").write_text(json.dumps(content))
    return out


def tuned(folder: Path, out: Path, size: float = 0.1, **config: Any) -> Path:
    tensors = {
        name: tensor + noise(len(name), *tensor.shape, size=size).to(tensor.dtype)
        for name, tensor in load_file(folder / WHOLE).items()
    }
    return changed(folder, out, config, **tensors)


OFF: list[dict[str, Any]] = [
    {"quantization_config": {}},
    {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": False}},
    {"quantization_config": None, "compression_config": {}},
]


@pytest.mark.parametrize("config", OFF, ids=[json.dumps(each) for each in OFF])
def test_quantisation_that_is_switched_off_hinders_nothing_and_is_not_handed_on(
    tiny: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    base = changed(tiny(), tmp_path / "base", config)
    other = tuned(tiny(), tmp_path / "other", **config)
    load_base(base, ModelSettings(path=str(base), dtype="float32"))
    report = merge(base, [open_source(other, base)], AverageSettings(), tmp_path / "out")
    assert "LlamaForCausalLM" in report.checked
    assert (
        not {"quantization_config", "compression_config"}
        & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in load_file(other / WHOLE).items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-6)


@pytest.fixture
def twice(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A model that ties its output layer to its embeddings, and stores both."""

    def build(dtype: torch.dtype = torch.float32) -> Path:
        tied = tiny(dtype=dtype, tie_word_embeddings=True)
        return changed(tied, tmp_path / "base", {}, **{HEAD: load_file(tied / WHOLE)[EMBEDDINGS]})

    return build


def test_an_output_layer_that_the_merge_parts_from_the_embeddings_is_loaded_as_it_was_merged(
    twice: Callable[..., Path], tmp_path: Path
) -> None:
    base = twice()
    untied = tuned(base, tmp_path / "untied", tie_word_embeddings=False)
    report = merge(base, [open_source(untied, base)], AverageSettings(), tmp_path / "out")
    assert any("(tie_word_embeddings: false)" in note for note in report.notes)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in (HEAD, EMBEDDINGS):
        torch.testing.assert_close(loaded[name], load_file(untied / WHOLE)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        TaskArithmeticSettings(rounding="stochastic"),
        DareTiesSettings(density=0.5),
        TaskArithmeticSettings(rounding="stochastic", dtype="float16"),
    ],
    ids=["rounded at random", "dropped at random", "in another dtype"],
)
@pytest.mark.parametrize("compiled", [None, False])
def test_tied_tensors_that_are_stored_twice_stay_tied_whatever_is_drawn(
    twice: Callable[..., Path], tmp_path: Path, settings: Any, compiled: bool | None
) -> None:
    base = twice(torch.bfloat16)
    embeddings = load_file(base / WHOLE)[EMBEDDINGS] + noise(4, 128, 32, size=0.01).bfloat16()
    both = {HEAD: embeddings, EMBEDDINGS: embeddings}
    other = changed(base, tmp_path / "other", {}, **both)
    report = merge(base, [open_source(other, base)], settings, tmp_path / "out", compiled=compiled)
    out = load_file(tmp_path / "out" / WHOLE)
    assert torch.equal(out[HEAD], out[EMBEDDINGS])
    assert not torch.equal(out[HEAD].float(), load_file(base / WHOLE)[HEAD].float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert not any("tie_word_embeddings" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["base", "float32"])
def test_rounding_at_random_of_what_is_not_rounded_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, dtype: Any
) -> None:
    other = tuned(tiny(), tmp_path / "other")
    with pytest.raises(
        RecipeError, match=r"^merge\.rounding: stochastic rounds to 16 bits, .* written in float32; leave it out"
    ):
        merge(
            tiny(), [open_source(other, tiny())], AverageSettings(dtype=dtype, rounding="stochastic"), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
