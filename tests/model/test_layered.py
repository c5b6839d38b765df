"""A base that is given unlearning layers: it computes what it did, and is refused where it cannot have them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from picked import few
from spunge.errors import RecipeError
from spunge.model.layered import base_folder, layered
from spunge.model.loading import load_base, load_tokenizer
from spunge.recipe.model import ModelSettings, UnlearningLayers
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.unlearning_layers import INSIDE, KINDS, UnlearningLayer
from toys import ARCHITECTURES, SMALL

IDS = torch.tensor([[5, 6, 7, 8, 9], [30, 20, 10, 40, 50]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def changed(folder: Path, out: Path) -> Path:
    """A copy of a folder whose layers add something."""
    shutil.copytree(folder, out)
    base = load_base(out, ModelSettings(path=str(out), dtype="float32"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if f".{INSIDE}.up." in name:
            parameter.data.copy_(10 * torch.randn(parameter.shape, generator=generator))
    for name in ("model.safetensors.index.json", "unlearning_layers.safetensors", "model-without-layers.safetensors"):
        (out / name).unlink()
    base.model.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", few(KINDS, KINDS.index("llama"), KINDS.index("gpt2")))
def test_a_base_with_new_layers_computes_what_it_did_and_with_others_what_they_add(
    tiny: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    plain = tiny(kind) if kind in ARCHITECTURES else tiny(kind, **SMALL, head_dim=8)
    folder = layered(plain, UnlearningLayers(size=3))
    model = load_base(folder, ModelSettings(path=str(folder), dtype="float32")).model
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(plain)))
    there, added = Checkpoint(plain).tensors, Checkpoint(folder).tensors
    assert set(there) < set(added)
    assert {name.rpartition(f".{INSIDE}.")[2] for name in set(added) - set(there)} == {"down.weight", "up.weight"}
    assert len(added) - len(there) == 2 * model.config.num_hidden_layers
    own = changed(folder, tmp_path / "changed")
    found = logits_of(load_base(own, ModelSettings(path=str(own), dtype="float32")).model)
    # The same by hand: hooks on the feed-forward networks of a model without layers.
    by_hand, tensors = AutoModelForCausalLM.from_pretrained(plain), Checkpoint(own)
    networks = {path: module for path, module in by_hand.named_modules() if path.endswith(".mlp")}
    for path, network in networks.items():
        down, up = (tensors.read(f"{path}.{INSIDE}.{each}.weight") for each in ("down", "up"))
        network.register_forward_hook(
            lambda _module, _inputs, out, down=down, up=up: out + (out @ down.T).relu() @ up.T
        )
    torch.testing.assert_close(found, logits_of(by_hand))
    assert (found - logits_of(model)).abs().max() > 1e-3


def test_the_code_in_the_folder_is_what_computes_it_without_this_package(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed(layered(tiny("llama"), UnlearningLayers(size=3)), tmp_path / "changed")
    auto = json.loads((folder / "config.json").read_text())["auto_map"]
    config, model = (
        get_class_from_dynamic_module(auto[name], folder) for name in ("AutoConfig", "AutoModelForCausalLM")
    )
    assert "spunge" not in (folder / "unlearning_layers.py").read_text()
    loaded = model.from_pretrained(folder, config=config.from_pretrained(folder))
    assert type(loaded).__module__.startswith("transformers_modules")
    own = load_base(folder, ModelSettings(path=str(folder), dtype="float32")).model
    assert torch.equal(logits_of(loaded), logits_of(own))


def test_a_layer_is_its_formula() -> None:
    layer = UnlearningLayer(2, 3, "relu").double()
    down = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, -3.0]], dtype=torch.float64)
    up = torch.tensor([[2.0, 0.0, 1.0], [0.5, -4.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(layer(down), down)
        layer.down.weight.copy_(down)
        layer.up.weight.copy_(up)
        # down (1, -1) = (-1, -1.5, 3), relu (0, 0, 3), up (3, 3).
        assert layer(torch.tensor([1.0, -1.0], dtype=torch.float64)).tolist() == [4.0, 2.0]


def test_the_same_model_and_settings_are_one_folder_of_one_fingerprint(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layered(tiny("llama"), UnlearningLayers(size=3))
    assert layered(tiny("llama"), UnlearningLayers(size=3)) == folder
    assert layered(tiny("llama"), UnlearningLayers(size=4)) != folder
    assert layered(tiny("llama"), UnlearningLayers(size=3, activation="gelu")) != folder
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "another"))
    other = layered(tiny("llama"), UnlearningLayers(size=3))
    assert other != folder
    assert Checkpoint(other).fingerprint() == Checkpoint(folder).fingerprint()
    assert all(not path.name.endswith(".part") for path in folder.parent.iterdir())


def test_a_model_in_several_files_keeps_them_all(tiny: Callable[..., Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(Checkpoint(tmp_path / "parts").files) > 2
    with_layers = Checkpoint(layered(tmp_path / "parts", UnlearningLayers()))
    for name, info in Checkpoint(tiny("llama")).tensors.items():
        assert torch.equal(with_layers.read(name), Checkpoint(tiny("llama")).read(name)), info


def test_a_tokenizer_that_transformers_would_read_otherwise_is_written_as_it_was(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    # Of a Qwen 2 the class is told by the model's type, whatever the file says; a type of our own has none.
    given = Path(shutil.copytree(tiny("qwen2"), tmp_path / "given"))
    said = json.loads((given / "tokenizer_config.json").read_text())
    (given / "tokenizer_config.json").write_text(json.dumps({**said, "tokenizer_class": None}))
    folder = layered(given, UnlearningLayers())
    before, after = (load_tokenizer(ModelSettings(path=str(each)), each) for each in (given, folder))
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert after("the capital of france")["input_ids"] == before("the capital of france")["input_ids"]


def test_another_tokenizer_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(tiny("llama"), tmp_path / "given"))

    def another(settings: ModelSettings, folder: Path) -> Any:
        tokenizer = load_tokenizer(settings, folder)
        if folder != given:
            tokenizer.add_tokens(["unheard"])
        return tokenizer

    monkeypatch.setattr("spunge.model.layered.load_tokenizer", another)
    with pytest.raises(RecipeError, match=r"model\.unlearning_layers: transformers reads another tokenizer"):
        layered(given, UnlearningLayers())


def test_the_width_is_a_sixteenth_of_the_models(tiny: Callable[..., Path]) -> None:
    tensors = Checkpoint(layered(tiny("llama"), UnlearningLayers())).tensors
    assert tensors[f"model.layers.0.mlp.{INSIDE}.down.weight"].shape == (2, 32)


def test_what_cannot_have_layers_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    once = layered(tiny("llama"), UnlearningLayers())
    with pytest.raises(RecipeError, match=r"model\.unlearning_layers: .* has unlearning layers; leave it out"):
        layered(once, UnlearningLayers())
    with pytest.raises(RecipeError, match=r"model\.unlearning_layers: .* is of the type 'opt'"):
        layered(tiny("opt"), UnlearningLayers())
    pickled = Path(shutil.copytree(tiny("llama"), tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    settings = ModelSettings(path=str(pickled), allow_pickle=True, unlearning_layers=UnlearningLayers())
    with pytest.raises(RecipeError, match=r"model\.unlearning_layers: .* pickled or quantised"):
        base_folder(settings)


def test_a_model_type_of_that_ending_that_is_none_of_ours_is_left_to_transformers(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    for kind in ("nothing_with_unlearning_layers", "llama_with_unlearning_layers"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "architectures": None}))
        with pytest.raises(RecipeError, match=r"model\.path"):
            load_base(folder, ModelSettings(path=str(folder)))
