"""Which stored tensor lies where in a model, and which is which of another checkpoint's: transformers' loading is the oracle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import TaskArithmeticSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.names import layout_of, skeletons
from spunge.weights.opening import open_source
from variety import MODELS, loaded

WHOLE = {
    "llama4": "Llama4ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
}
Change = Callable[[str, Tensor], dict[str, Tensor]]


def kind_of(name: str) -> str:
    return WHOLE.get(name, "AutoModelForCausalLM")


@pytest.mark.parametrize("name", MODELS)
def test_every_stored_tensor_lies_where_transformers_puts_it(base_of: Callable[..., Path], name: str) -> None:
    folder = base_of(name, WHOLE.get(name, ""))
    checkpoint, model = Checkpoint(folder), loaded(folder, kind_of(name))
    hollow = next(made for make in skeletons(folder) if type(made := make()) is type(model))
    layout = layout_of(hollow, checkpoint)
    assert layout == layout_of(model, checkpoint)
    assert set(layout.homes) == set(checkpoint.tensors)
    own = model.state_dict()
    assert {layout.aliases[name] for name in own} == set(layout.regions)
    for stored, (home, region) in layout.homes.items():
        assert torch.equal(region.of(own[home]), checkpoint.read(stored))


def rewritten(folder: Path, out: Path, change: Change) -> Path:
    """A copy whose tensors have other names, or are more or fewer."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    new = {key: value.clone() for name, tensor in tensors.items() for key, value in change(name, tensor).items()}
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


def tuned(folder: Path, out: Path) -> Path:
    """Another model of the same architecture, as transformers saves it today."""
    noise = torch.Generator().manual_seed(1)
    return rewritten(
        folder, out, lambda name, tensor: {name: tensor + 0.05 * torch.randn(tensor.shape, generator=noise)}
    )


def published(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As years ago: the model's prefix left out, and masks and frequencies stored beside the weights."""
    short = name.removeprefix("transformer.")
    stored = {short: tensor}
    for layer, module in (("attn.c_proj.weight", "attn"), ("attention.dense.weight", "attention")):
        if name.endswith(layer):
            place = short.removesuffix(layer) + module
            stored |= {f"{place}.bias": torch.ones(1, 1, 64, 64).tril(), f"{place}.masked_bias": torch.tensor(-1e9)}
    if name.endswith(("self_attn.q_proj.weight", "attention.dense.weight")):
        stored[f"{short.rsplit('.', 2)[0]}.rotary_emb.inv_freq"] = torch.rand(4)
    return stored


def renamed(before: str, after: str) -> Change:
    return lambda name, tensor: {name.replace(before, after): tensor}


OTHERWISE: dict[str, tuple[str, Change]] = {
    "gpt2 as published": ("gpt2", published),
    "bloom as published": ("bloom", published),
    "pythia as published": ("gpt_neox", published),
    "llama 2 as published": ("llama", published),
    "gemma 3 by the names in memory": ("gemma3", renamed("language_model.model.", "model.language_model.")),
    "llava by the names in memory": ("llava", renamed("language_model.model.", "model.language_model.")),
    "qwen2 vl by the names in memory": ("qwen2_vl", renamed("model.layers.", "model.language_model.layers.")),
    "gpt_neox by the names in memory": ("gpt_neox", renamed("embed_out", "lm_head")),
}


def assert_half_way(base: Path, model: Path, out: Path, before: dict[str, Tensor], after: dict[str, Tensor], kind: str):
    """A merge at half the scale, as transformers loads it, is half way between both models."""
    merge(base, [open_source(model, base)], TaskArithmeticSettings(scale=0.5), out)
    assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    for name, tensor in loaded(out, kind).state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.5 * (after[name] - before[name]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("which", ["base", "model"])
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_model_stored_otherwise_merges_like_the_same_model_stored_today(
    base_of: Callable[..., Path], tmp_path: Path, name: str, which: str
) -> None:
    architecture, change = OTHERWISE[name]
    kind, today = kind_of(architecture), base_of(architecture, WHOLE.get(architecture, ""))
    pair = {"base": today, "model": tuned(today, tmp_path / "tuned")}
    values = [loaded(folder, kind).state_dict() for folder in pair.values()]
    pair[which] = rewritten(pair[which], tmp_path / "otherwise", change)
    assert_half_way(pair["base"], pair["model"], tmp_path / "out", *values, kind)


@pytest.mark.parametrize("which", ["base", "model"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_and_experts_one_by_one_are_the_same_model(
    base_of: Callable[..., Path], tmp_path: Path, name: str, which: str
) -> None:
    pair = {"base": base_of(name), "model": tuned(base_of(name), tmp_path / "tuned")}
    values = [loaded(folder).state_dict() for folder in pair.values()]
    loaded(pair[which]).save_pretrained(tmp_path / "together", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "together" / "model.safetensors"))
    pair[which] = tmp_path / "together"
    assert_half_way(pair["base"], pair["model"], tmp_path / "out", *values, kind_of(name))


TIED = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("which", ["base", "model"])
@pytest.mark.parametrize("stored", [TIED[:1], TIED[1:], TIED])
def test_tied_weights_are_matched_whichever_of_their_names_is_stored(
    base_of: Callable[..., Path], tmp_path: Path, which: str, stored: list[str]
) -> None:
    pair = {"base": base_of("tied"), "model": tuned(base_of("tied"), tmp_path / "tuned")}
    values = [loaded(folder).state_dict() for folder in pair.values()]
    pair[which] = rewritten(
        pair[which],
        tmp_path / "otherwise",
        lambda name, tensor: dict.fromkeys(stored if "embed_tokens" in name else [name], tensor),
    )
    assert_half_way(pair["base"], pair["model"], tmp_path / "out", *values, kind_of("llama"))
    merged = loaded(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def refusal(base: Path, model: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        open_source(model, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_head_trained_apart_from_the_embeddings_that_the_base_ties_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    def with_a_head(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor, **({"lm_head.weight": tensor + 1} if "embed" in name else {})}

    model = rewritten(base_of("tied"), tmp_path / "m", with_a_head)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "has tensor 'lm_head.weight', which the base lacks" in refusal(base_of("tied"), model)


def test_tensors_that_the_model_does_not_take_are_left_out_and_said(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    def with_a_value_head(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor, **({"v_head.weight": tensor[:1]} if "wte" in name else {})}

    model = rewritten(tuned(base_of("gpt2"), tmp_path / "t"), tmp_path / "m", with_a_value_head)
    report = merge(base_of("gpt2"), [open_source(model, base_of("gpt2"))], TaskArithmeticSettings(), tmp_path / "out")
    assert report.notes == ["left out of 'm', since the model does not take them: v_head.weight"]
    assert "v_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("lost", ["transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"])
def test_a_tensor_that_a_model_lacks_is_named_whatever_the_names(
    base_of: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    def short_and_fewer(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {} if name == lost else {name.removeprefix("transformer."): tensor}

    model = rewritten(base_of("gpt2"), tmp_path / "m", short_and_fewer)
    assert f"lacks tensor {lost!r} of the base" in refusal(base_of("gpt2"), model)


def test_a_model_that_transformers_saves_again_under_another_kind_is_the_same(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import CONFIG_MAPPING

    if "internlm3" not in CONFIG_MAPPING:
        pytest.skip("this transformers knows no internlm3")
    base = shutil.copytree(base_of("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "internlm3"}))
    model = tuned(base_of("llama"), tmp_path / "tuned")
    values = [loaded(folder).state_dict() for folder in (base, model)]
    assert_half_way(base, model, tmp_path / "out", *values, kind_of("llama"))
