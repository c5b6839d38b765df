"""Models as trainers leave them: under a wrapper's names, without an output layer, in folders beside each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from making import noise
from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import AverageSettings
from spunge.model.conversion import convert
from spunge.model.loadable import check_fit
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import WHOLE, Checkpoint
from spunge.weights.opening import open_source
from spunge.weights.wrapping import unwrapped


def tuned(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    tensors = {name: tensor + noise(3, *tensor.shape, size=0.1) for name, tensor in load_file(folder / WHOLE).items()}
    save_file(tensors, out / WHOLE, metadata={"format": "pt"})
    return out


class Wrapper(nn.Module):
    """Holds a module under the name that DDP and DeepSpeed give it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


def of_torch_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def block_by_block(model: nn.Module) -> nn.Module:
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer)
    return model


def inner_model(model: nn.Module) -> nn.Module:
    model.model = torch.compile(model.model)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": Wrapper,
    "DDP of DDP": lambda model: Wrapper(Wrapper(model)),
    "torch.compile": of_torch_compile,
    "torch.compile of the blocks": block_by_block,
    "torch.compile of the inner model": inner_model,
    "torch.compile in DDP": lambda model: Wrapper(of_torch_compile(model)),
    "DDP in torch.compile": lambda model: of_torch_compile(Wrapper(model)),
}


def wrapped(folder: Path, out: Path, how: str) -> Path:
    """The folder's model, saved by the names that its wrapper has for it."""
    shutil.copytree(folder, out)
    tensors = WRAPPERS[how](transformers.AutoModelForCausalLM.from_pretrained(folder)).state_dict()
    assert not any(name in load_file(folder / WHOLE) for name in tensors if "layers" in name)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, out / WHOLE, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_model_under_its_wrappers_names_is_merged_as_the_model_inside(
    tiny: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    inside = tuned(tiny(), tmp_path / "inside")
    source = open_source(wrapped(inside, tmp_path / "wrapped", how), tiny())
    merge(tiny(), [source], AverageSettings(), tmp_path / "out")
    got, exact = load_file(tmp_path / "out" / WHOLE), load_file(inside / WHOLE)
    assert got.keys() == exact.keys()
    for name, tensor in exact.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_base_under_its_wrappers_names_is_refused_with_the_wrapper(
    tiny: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    folder = wrapped(tiny(), tmp_path / "wrapped", how)
    with pytest.raises(RecipeError, match=r"bear .*(torch\.compile|DDP).*: save the model inside"):
        check_fit(Checkpoint(folder))
    torch.save(load_file(folder / WHOLE), folder / "pytorch_model.bin")
    (folder / WHOLE).unlink()
    with pytest.raises(RecipeError, match=r"fill at random; the names in it bear .*: save the model inside"):
        convert(folder, tmp_path / "converted", ModelSettings(path=str(folder), allow_pickle=True))
    assert not (tmp_path / "converted").exists()


def test_an_adapter_under_its_wrappers_names_is_the_adapter_inside(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny())
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "plain"
    )
    shutil.copytree(tmp_path / "plain", tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "adapter_model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    sources = [open_source(tmp_path / name, tiny()) for name in ("plain", "wrapped")]
    assert sources[0].names == sources[1].names
    for name in sources[0].names:
        entries = [each.read(name, 0, 64, torch.zeros(64)) for each in sources]
        assert torch.equal(*entries)


def test_names_that_would_become_one_stay_as_they_are() -> None:
    assert unwrapped(["a._orig_mod.b", "a.b"]) == {"a._orig_mod.b": "a._orig_mod.b", "a.b": "a.b"}
    assert unwrapped(["module.a", "head.b"]) == {"module.a": "module.a", "head.b": "head.b"}
    assert unwrapped(["module"]) == {"module": "module"}


def headless(folder: Path, out: Path) -> Path:
    transformers.AutoModel.from_pretrained(folder).save_pretrained(out)
    return out


def test_of_a_model_saved_without_its_output_layer_the_base_keeps_its_own_and_it_is_said(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    whole = tuned(tiny(), tmp_path / "whole")
    source = open_source(headless(whole, tmp_path / "bare"), tiny())
    assert source.notes == ["'bare' was saved without an output layer: 'lm_head.weight' is the base's"]
    merge(tiny(), [source], AverageSettings(), tmp_path / "out")
    exact = {**load_file(whole / WHOLE), "lm_head.weight": load_file(tiny() / WHOLE)["lm_head.weight"]}
    for name, tensor in load_file(tmp_path / "out" / WHOLE).items():
        torch.testing.assert_close(tensor, exact[name], rtol=0, atol=1e-6)


def test_a_whole_model_that_lacks_its_output_layer_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = headless(tiny(), tmp_path / "m")
    shutil.copy(tiny() / "config.json", folder / "config.json")
    with pytest.raises(RecipeError, match=r"lacks tensor 'lm_head\.weight' of the base"):
        open_source(folder, tiny())


@pytest.mark.parametrize("kind", ["model.safetensors", "adapter_config.json", "pytorch_model.bin"])
def test_of_a_trainers_folder_the_checkpoints_are_listed_by_number(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    for step in (1000, 500, 1500, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / kind).write_text("{}")
    with pytest.raises(RecipeError) as caught:
        open_source(tmp_path / "run", tiny())
    assert str(caught.value).endswith(
        "its folders 'checkpoint-20', 'checkpoint-500', ..., 'checkpoint-1500' do: give one of these, such as the last"
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"], "here are 2 .*join"),
        (["adapter_model.bin"], "pickled adapters are not read: load it with peft"),
        ([], "settings alone: download it again"),
    ],
)
def test_an_adapter_without_its_file_is_refused_with_what_to_do(
    tiny: Callable[..., Path], tmp_path: Path, files: list[str], said: str
) -> None:
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path / "a"))
    for name in files:
        (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(RecipeError, match=rf"^--model: 'a' has no adapter_model.safetensors; .*{said}"):
        open_source(tmp_path / "a", tiny())


def with_tensors(folder: Path, out: Path, **more: torch.Tensor) -> Path:
    shutil.copytree(folder, out)
    save_file({**load_file(folder / WHOLE), **more}, out / WHOLE, metadata={"format": "pt"})
    return out


def test_tensors_of_a_base_that_the_model_does_not_read_are_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    odd = {f"mtp.{number}.weight": torch.ones(4) for number in range(5)}
    base = with_tensors(tiny(), tmp_path / "base", **odd, **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    other = tuned(tiny(), tmp_path / "other")
    report = merge(base, [open_source(other, base)], AverageSettings(), tmp_path / "out")
    [note] = [note for note in report.notes if "reads no" in note]
    assert note.startswith(
        "the model reads no 'model.layers.0.self_attn.k_scale', 'mtp.0.weight', 'mtp.1.weight' and 3 more"
    )
    assert load_file(tmp_path / "out" / WHOLE).keys() == load_file(base / WHOLE).keys()


@pytest.mark.parametrize(
    "name", ["q_proj.weight_scale", "q_proj.weight.absmax", "q_proj.scales", "q_proj.weight_scale_inv"]
)
def test_a_base_whose_weights_have_scales_that_the_model_does_not_read_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    scale = {f"model.layers.1.self_attn.{name}": torch.full((1,), 2.0)}
    base, other = with_tensors(tiny(), tmp_path / "base", **scale), tuned(tiny(), tmp_path / "other")
    with pytest.raises(RecipeError, match=rf"holds 'model\.layers\.1\.self_attn\.{name}', .*the model does not read"):
        merge(base, [open_source(other, base)], AverageSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "model"])
def test_powers_of_two_are_refused_by_the_name_of_their_dtype(
    tiny: Callable[..., Path], tmp_path: Path, side: str
) -> None:
    tensors = {
        name: torch.ones(tensor.shape).to(torch.float8_e8m0fnu) for name, tensor in load_file(tiny() / WHOLE).items()
    }
    odd, plain = with_tensors(tiny(), tmp_path / "odd", **tensors), tuned(tiny(), tmp_path / "plain")
    base, model = (odd, plain) if side == "base" else (plain, odd)
    with pytest.raises(RecipeError, match=r"stores '.*' as float8_e8m0fnu, which holds powers of two alone"):
        merge(base, [open_source(model, base)], AverageSettings(), tmp_path / "out")


def test_checkpoints_of_one_folder_are_told_from_the_folder_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny(), tmp_path / "run" / "checkpoint-5")
    with pytest.raises(RecipeError, match="its folder 'checkpoint-5' does"):
        open_source(tmp_path / "run", tiny())
    assert json.loads((tiny() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
