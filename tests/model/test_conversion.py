"""Pickled and quantised models, converted by transformers where the user asks for it: exact, and else refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantising
from spunge.errors import RecipeError
from spunge.model.conversion import conversion, convert
from spunge.model.hub import judges_folder, local_folder
from spunge.recipe.model import ModelSettings
from spunge.weights import expressions
from spunge.weights.checkpoint import WHOLE, Checkpoint
from spunge.weights.folder import note_of
from spunge.weights.quantised import quantisation

Tensors = dict[str, torch.Tensor]


def settings(folder: Path, **values: Any) -> ModelSettings:
    return ModelSettings(path=str(folder), **values)


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, tuple[Path, Tensors]]:
    """A folder in each format, and the values that it stands for."""
    root = tmp_path_factory.mktemp("quantised")
    made = {}
    for name, kind in (("fp8", "llama"), ("fp8 experts", "qwen3_moe"), ("mxfp4", "gpt_oss")):
        quantising.model(kind, root / kind)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, root / kind / file.name)
        made[name] = root / name, quantising.quantise(root / kind, root / name)
    return made


@pytest.mark.parametrize("kind", ["fp8", "fp8 experts", "mxfp4"])
def test_a_quantised_model_is_converted_to_the_values_that_it_stands_for(
    quantised: dict[str, tuple[Path, Tensors]], tmp_path: Path, kind: str
) -> None:
    folder, values = quantised[kind]
    with pytest.raises(RecipeError, match=r"^model\.path: .* is quantised \(.*set model\.dequantize=true"):
        local_folder(settings(folder))
    asked = settings(folder, dequantize=True)
    convert(local_folder(asked), tmp_path / "base", asked)
    got = load_file(tmp_path / "base" / WHOLE)
    assert got.keys() == values.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, values[name]), name
    assert quantisation(Checkpoint(tmp_path / "base")) is None
    assert "quantization_config" not in json.loads((tmp_path / "base" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert loaded.dtype == torch.bfloat16
    ids = torch.tensor([[5, 9, 7, 30]])
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(loaded(ids).logits, reference(ids).logits)
    assert "is quantised" in str(note_of(tmp_path / "base"))
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokens("paris is").input_ids == transformers.AutoTokenizer.from_pretrained(folder)("paris is").input_ids


def test_a_gguf_file_is_converted_to_the_values_that_it_stands_for(tmp_path: Path, tokenizer_folder: Path) -> None:
    pytest.importorskip("gguf")
    if sys.version_info < (3, 11):
        pytest.skip("transformers reads no GGUF files on Python 3.10")
    quantising.model("llama", tmp_path / "llama")
    values = quantising.gguf(tmp_path / "llama", tmp_path / "gguf")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "gguf" / file.name)
    with pytest.raises(RecipeError, match=r"model-Q8_0\.gguf.*give the unquantised model, or set model\.dequantize"):
        local_folder(settings(tmp_path / "gguf"))
    asked = settings(tmp_path / "gguf", dequantize=True)
    convert(local_folder(asked), tmp_path / "base", asked)
    got = load_file(tmp_path / "base" / WHOLE)
    assert got.keys() == values.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, values[name]), name


def spoiled(folder: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(folder, out)
    save_file(change(load_file(out / WHOLE)), out / WHOLE, metadata={"format": "pt"})
    return out


SPOILS: dict[str, Callable[[Tensors], Tensors]] = {
    "without one scale": lambda t: {k: v for k, v in t.items() if k != "model.layers.0.mlp.up_proj.weight_scale_inv"},
    "with scales by another name": lambda t: {k.replace("_scale_inv", "_scale"): v for k, v in t.items()},
    "with blocks that do not fill a weight": lambda t: {
        k: torch.ones(5, 4) if k == "model.layers.0.mlp.up_proj.weight_scale_inv" else v for k, v in t.items()
    },
    "without one weight": lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj" not in k},
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_transformers_would_load_without_its_scales_is_refused(
    quantised: dict[str, tuple[Path, Tensors]], tmp_path: Path, spoil: str
) -> None:
    folder = spoiled(quantised["fp8"][0], tmp_path / "spoiled", SPOILS[spoil])
    asked = settings(folder, dequantize=True)
    with pytest.raises(RecipeError, match=r"is quantised \(fp8, says its config\.json\) (and cannot|in a way that) "):
        convert(local_folder(asked), tmp_path / "base", asked)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "torchao", "quanto", "a method of tomorrow"])
def test_a_format_that_transformers_does_not_undo_is_refused_whatever_is_asked(
    quantised: dict[str, tuple[Path, Tensors]], tmp_path: Path, method: str
) -> None:
    shutil.copytree(quantised["fp8"][0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for dequantize in (False, True):
        with pytest.raises(RecipeError, match=rf"quantised \({method}, 4 bits.*give the unquantised model$"):
            local_folder(settings(tmp_path / "model", dequantize=dequantize))


def test_a_regular_expression_that_never_ends_is_refused_before_transformers_matches_it(
    tmp_path: Path, quantised: dict[str, tuple[Path, Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.15)
    shutil.copytree(quantised["fp8"][0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "re:(.+)+#"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RecipeError, match=r"has '\(\.\+\)\+#' in its quantization_config, a regular expression that is not done"
    ):
        convert(tmp_path / "model", tmp_path / "base", settings(tmp_path / "model", dequantize=True))


def test_packed_tensors_that_no_configuration_explains_are_refused(
    quantised: dict[str, tuple[Path, Tensors]], tmp_path: Path
) -> None:
    shutil.copytree(quantised["fp8"][0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"quantised \(fp8 in blocks, by its tensor .*give the unquantised model$"):
        local_folder(settings(tmp_path / "model", dequantize=True))


def test_a_configuration_that_calls_plain_tensors_quantised_is_refused_with_its_mend(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As trainers leave it that merged an adapter into the weights of before the quantisation."""
    shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for dequantize in (False, True):
        with pytest.raises(RecipeError, match=r"plain numbers; .* take quantization_config out of config\.json$"):
            local_folder(settings(tmp_path / "model", dequantize=dequantize))


def test_a_library_that_is_missing_is_named(tmp_path: Path, quantised: dict[str, tuple[Path, Tensors]]) -> None:
    shutil.copytree(quantised["fp8"][0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    if transformers.utils.is_bitsandbytes_available():
        pytest.skip("it is installed here")
    asked = settings(tmp_path / "model", dequantize=True)
    with pytest.raises(RecipeError, match=r"cannot be converted by transformers \(.*bitsandbytes"):
        convert(local_folder(asked), tmp_path / "base", asked)


def test_several_gguf_files_are_not_chosen_from(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(RecipeError, match="holds 2 GGUF files"):
        local_folder(settings(tmp_path, dequantize=True))


def test_a_gguf_file_beside_a_model_is_left_out_of_account(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny(), tmp_path / "model")
    (tmp_path / "model" / "model.gguf").touch()
    assert conversion(tmp_path / "model") is None


def test_a_model_that_judges_may_be_quantised(quantised: dict[str, tuple[Path, Tensors]]) -> None:
    folder = quantised["fp8"][0]
    assert judges_folder(settings(folder), "evaluate.judge") == folder


def pickled(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    torch.save(load_file(out / WHOLE), out / "pytorch_model.bin")
    (out / WHOLE).unlink()
    return out


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_pickled_weights_are_refused_unless_allowed(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    folder = pickled(tiny(architecture), tmp_path / "pickled")
    with pytest.raises(RecipeError, match=r"model\.path: .*pickled weights alone \(pytorch_model\.bin\).*allow_pickle"):
        local_folder(settings(folder))
    with pytest.raises(RecipeError, match=r"evaluate\.judge: .*pickled weights alone"):
        judges_folder(settings(folder), "evaluate.judge")
    allowed = settings(folder, allow_pickle=True)
    convert(local_folder(allowed), tmp_path / "base", allowed)
    assert Checkpoint(tmp_path / "base").fingerprint() == Checkpoint(tiny(architecture)).fingerprint()
    assert note_of(tmp_path / "base") is None


def test_a_model_of_which_transformers_would_make_up_weights_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = spoiled(tiny(), tmp_path / "m", lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    for chosen in (local_folder, judges_folder):
        with pytest.raises(RecipeError, match=r"lacks 'lm_head\.weight', which its config\.json asks for"):
            chosen(settings(folder), "model.path")
