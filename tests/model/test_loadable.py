"""What is found out without reading a tensor is what transformers finds when it loads them all."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from experts import EXPERTS, build_experts
from spunge.errors import RecipeError
from spunge.model.loadable import check_fit, fit
from spunge.weights.checkpoint import Checkpoint
from toys import ARCHITECTURES, SMALL

Tensors = dict[str, torch.Tensor]


def really(folder: Path) -> tuple[set[str], set[str]]:
    """Missing and mismatched parameters of a real loading."""
    _, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return set(loaded["missing_keys"]), {entry[0] for entry in loaded["mismatched_keys"]}


@pytest.fixture
def altered(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """altered(architecture, change): a copy of a tiny model, its tensors changed by a function."""

    def build(architecture: str, change: Callable[[Tensors], Any], **settings: Any) -> Path:
        folder = tiny(architecture, **settings)
        tensors = load_file(folder / "model.safetensors")
        tensors = change(tensors) or tensors
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return build


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_as_transformers_saves_it_fits(tiny: Callable[..., Path], architecture: str) -> None:
    folder = tiny(architecture)
    config = json.loads((folder / "config.json").read_text())
    assert check_fit(Checkpoint(folder)).architecture == config["architectures"][0]


@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_model_whose_experts_are_stacked_on_loading_fits(
    architecture: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = build_experts(architecture, tmp_path / "model", tokenizer_folder)
    assert check_fit(Checkpoint(folder)).architecture is not None


CHANGES: dict[str, tuple[str, Callable[[Tensors], Any]]] = {
    "a tensor is missing": ("llama", lambda t: {k: v for k, v in t.items() if k != "model.layers.1.mlp.up_proj.weight"}),
    "a block is missing": ("llama", lambda t: {k: v for k, v in t.items() if ".layers.3." not in k}),
    "the output layer is missing": ("llama", lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}),
    "a vocabulary of another size": ("llama", lambda t: {**t, "lm_head.weight": torch.zeros(96, 32)}),
    "more tensors than wanted": ("llama", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "names without the prefix": ("gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}),
    "an older model's masks": ("gpt2", lambda t: {**t, "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
    "another architecture's names": ("opt", lambda t: {k.replace("decoder.", "encoder."): v for k, v in t.items()}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_missing_or_of_another_shape_is_what_transformers_finds(
    altered: Callable[..., Path], case: str
) -> None:
    folder = altered(*CHANGES[case])
    missing, mismatched = really(folder)
    found = fit(Checkpoint(folder))
    assert found.architecture is not None
    assert (set(found.missing), set(found.mismatched)) == (missing, mismatched)
    if missing or mismatched:
        with pytest.raises(RecipeError, match=r"^--base: .*config\.json"):
            check_fit(Checkpoint(folder, "--base"))


def test_integers_where_the_model_has_parameters_are_told_as_quantised(altered: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = altered("llama", lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(RecipeError, match=r"up_proj\.weight' as integers: it is quantised"):
        check_fit(Checkpoint(folder))


@pytest.mark.parametrize(
    "config", [{"model_type": "toy"}, {}, {"model_type": "llama", "hidden_size": "many"}, {"model_type": "bert"}]
)
def test_a_configuration_that_transformers_cannot_build_is_said(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    found = fit(Checkpoint(tmp_path))
    assert (found.architecture is None) == bool(found.reason)
    assert "\n" not in found.reason


def test_no_tensor_is_read_and_memory_stays_flat(tmp_path: Path) -> None:
    """A model of 8 GB whose file has no bytes on the disk."""
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    header, at = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + 4 * tensor.numel()],
        }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check_fit(Checkpoint(tmp_path)).architecture == "LlamaForCausalLM"
    assert at > 4e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
