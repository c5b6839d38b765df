"""Loading a base: names, pickles, broken folders; and checkpoints read piece by piece."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spunge.checkpoints import Checkpoint
from spunge.models import checkpoint_names, load_base, local_folder, pick_device, swapped, unpickled
from spunge.recipe import ModelSettings
from spunge.registry import RecipeError
from toys import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_its_name_in_the_checkpoint(load: Callable[..., Any], architecture: str) -> None:
    base = load(architecture)
    checkpoint = Checkpoint(base.folder)
    assert {name for name, _ in base.model.named_parameters()} == set(base.names)
    assert {key for keys in base.names.values() for key in keys} == set(checkpoint.tensors)
    for key, parameter in base.parameters.items():
        assert torch.equal(checkpoint.read(key), parameter)


def test_names_without_the_base_models_prefix_are_found(load: Callable[..., Any], tmp_path: Path) -> None:
    """GPT-2 on the Hub stores `h.0...` where the model says `transformer.h.0...`."""
    base = load("gpt2")
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(base.folder / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    names = checkpoint_names(base.model, Checkpoint(tmp_path))
    assert names["transformer.h.0.mlp.c_proj.weight"] == ("h.0.mlp.c_proj.weight",)
    assert len(names) == len(base.names)


def pickled(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    return out


def test_pickled_weights_are_refused_unless_allowed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = pickled(tiny(), tmp_path / "pickled")
    with pytest.raises(RecipeError, match=r"model\.path: .*pickled weights alone \(pytorch_model\.bin\).*allow_pickle"):
        local_folder(ModelSettings(path=str(folder)))
    allowed = ModelSettings(path=str(folder), allow_pickle=True)
    converted = unpickled(local_folder(allowed), tmp_path / "run" / "base", allowed)
    base, original = Checkpoint(converted), Checkpoint(tiny())
    assert base.fingerprint() == original.fingerprint()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "cannot be loaded as a causal language model",
        ),
    ],
)
def test_a_broken_folder_is_named(
    tiny: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    spoil(folder)
    settings = ModelSettings(path=str(folder))
    with pytest.raises(RecipeError, match=said) as caught:
        load_base(local_folder(settings), settings)
    assert str(caught.value).startswith("model.path: ")


def test_a_truncated_weight_file_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = (tiny() / "model.safetensors").read_bytes()
    for cut in (4, 200, len(content) - 10):
        file.write_bytes(content[:cut])
        with pytest.raises(RecipeError, match=r"model\.safetensors is truncated"):
            _ = Checkpoint(tmp_path).tensors


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}})
    )
    with pytest.raises(RecipeError, match=r"model-1-of-1\.safetensors is named .* but missing"):
        _ = Checkpoint(tmp_path).files


def test_the_fingerprint_depends_on_content_and_not_on_sharding(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2), "c": torch.zeros(0, 3)}
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    save_file({"a": tensors["a"]}, tmp_path / "two" / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "two" / "model-00002-of-00002.safetensors")
    save_file({**tensors, "b": tensors["b"] + 1}, tmp_path / "other" / "model.safetensors")
    one, two, other = (Checkpoint(tmp_path / name).fingerprint() for name in ("one", "two", "other"))
    assert one == two != other


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    whole = torch.randn(7, 5).bfloat16()
    save_file({"w": whole, "s": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("w", slice(2, 5)), whole[2:5])
    assert torch.equal(checkpoint.read("w"), whole)
    assert checkpoint.read("s").item() == 3.0


def test_swapped_puts_another_checkpoints_tensors_in_and_out(
    load: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    base = load("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    other = Checkpoint(tiny("llama", initializer_range=0.5))
    before = base.parameters[name].clone()
    with swapped(base.parameters, other, [name]):
        assert torch.equal(base.parameters[name], other.read(name))
        assert not torch.equal(base.parameters[name], before)
    assert torch.equal(base.parameters[name], before)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(RecipeError, match=r"model\.device: 'gpu7'"):
        pick_device("gpu7")


def test_a_models_own_code_is_not_run_unless_the_recipe_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    settings = ModelSettings(path=str(folder))
    with pytest.raises(RecipeError, match=r"model\.path: .*cannot be loaded"):
        load_base(local_folder(settings), settings)
    assert not mark.exists()
