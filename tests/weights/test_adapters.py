"""Adapters of every kind that can be opened: peft's own `merge_and_unload`, from its own loading, is the oracle."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from picked import few
from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import TaskArithmeticSettings
from spunge.weights import expressions
from spunge.weights.opening import open_source
from variety import loaded


def trained(
    base: Path, folder: Path, config: peft.PeftConfig, kind: str = "AutoModelForCausalLM", name: str = "default"
) -> Path:
    """An adapter with random factors, as peft saves it."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(loaded(base, kind), config, adapter_name=name)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder if name == "default" else folder / name


def described(folder: Path, base: Path, **changes: Any) -> Path:
    """A plain adapter whose settings say something else."""
    trained(base, folder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"target_modules": [1]}, "no list of names"),
        ({"target_modules": "[a"}, "no regular expression"),
        ({"target_modules": [{}]}, "no list of names"),
        ({"modules_to_save": 3}, "no list of names"),
        ({"rank_pattern": {"[]": 2}}, "no regular expression"),
        pytest.param(  # peft puts something before it
            {"rank_pattern": {"(?i)q_proj": 2}},
            "no regular expression there",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 takes flags in the middle"),
        ),
        ({"modules_to_save": ["lm_head("]}, "modules_to_save: .* no regular expression"),
        ({"alpha_pattern": {"q_proj": {}}}, "no numbers"),
        ({"r": float("nan")}, "no number"),
        ({"layers_to_transform": "ab"}, "no layers' numbers"),
        ({"layers_pattern": ["layers"]}, "does not take"),
        ({"trainable_token_indices": [[[1]]]}, "."),
    ],
)
def test_settings_of_another_type_are_refused_in_one_line(
    base_of: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    base = base_of("llama")
    with pytest.raises(RecipeError, match=told):
        open_source(described(tmp_path / "adapter", base, **changes), base)


ENDLESS = "(.+)+#"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"modules_to_save": [ENDLESS]},
        {"layers_pattern": ENDLESS, "layers_to_transform": [0]},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {"q_proj": 2, ENDLESS: 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_expression_that_never_ends_is_refused_by_its_field(
    base_of: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.15)
    base, field = base_of("llama"), next(iter(changes))
    adapter = described(tmp_path / "adapter", base, **changes)
    with pytest.raises(RecipeError, match=rf"^--model: 'adapter' has {field}: .* is not done with the model's"):
        open_source(adapter, base)


def merged(base: Path, adapter: Path, out: Path) -> list[str]:
    report = merge(base, [open_source(adapter, base)], TaskArithmeticSettings(), out)
    return report.notes


def assert_as_peft(base: Path, adapter: Path, out: Path, kind: str = "AutoModelForCausalLM") -> None:
    """Every tensor of the merged folder, as transformers loads it, is that of peft's own loading and merging."""
    merged(base, adapter, out)
    before = loaded(base, kind).state_dict()
    right = peft.PeftModel.from_pretrained(loaded(base, kind), adapter).merge_and_unload().state_dict()
    got = loaded(out, kind).state_dict()
    assert got.keys() == right.keys()
    assert any(not torch.allclose(before[name], right[name]) for name in right)
    for name, tensor in right.items():
        torch.testing.assert_close(
            got[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "without some": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "by a regular expression": ("llama", {"target_modules": r".*\.1\..*(q|o)_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "bias of all": ("biased", {"bias": "all"}),
    "bias of the adapted": ("biased", {"bias": "lora_only"}),
    "bias of the factors": ("biased", {"lora_bias": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora on Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora with biases": ("biased", {"use_dora": True, "bias": "all"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a parameter": ("llama", {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
    "modules whole": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "a block's mlp whole": ("llama", {"modules_to_save": ["mlp"]}),
    "tied embeddings whole": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "some tokens": ("llama", {"trainable_token_indices": [3, 5]}),
    "some tokens of tied embeddings": ("tied", {"trainable_token_indices": [3, 5]}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D and linear": ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True}),
    "fused query, key and value": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "experts stored apart": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts stored apart, of qwen": ("qwen3_moe", {"target_parameters": ["experts.down_proj"]}),
    "experts in one tensor": (
        "gpt_oss",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LORA)
def test_a_lora_is_merged_as_peft_merges_it(base_of: Callable[..., Path], tmp_path: Path, name: str) -> None:
    model, values = LORA[name]
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **values})
    base = base_of(model)
    assert_as_peft(base, trained(base, tmp_path / "adapter", config), tmp_path / "out")


def test_an_adapter_of_another_model_is_refused_by_name(base_of: Callable[..., Path], tmp_path: Path) -> None:
    place = trained(base_of("gpt2"), tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["c_attn"]))
    assert re.search(r"adapts .*c_attn.*the base lacks", refusal(base_of("llama"), place))


OTHERS = {
    "loha": peft.LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}),
    "lokr": peft.LoKrConfig(r=4, alpha=3, target_modules=["q_proj", "up_proj"], decompose_factor=4),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("model", ["llama", "biased"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_merged_as_peft_merges_them(
    base_of: Callable[..., Path], tmp_path: Path, name: str, model: str
) -> None:
    base = base_of(model)
    assert_as_peft(base, trained(base, tmp_path / "adapter", OTHERS[name]), tmp_path / "out")


def test_an_adapter_of_another_name_is_found_where_peft_saves_it(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    place = trained(base, tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]), name="second")
    assert_as_peft(base, place, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_lower_precision_are_read_as_they_are(
    base_of: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = base_of("llama")
    place = trained(base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    file = place / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items() if "base_layer" not in key}, file)
    assert_as_peft(base, place, tmp_path / "out")


@pytest.mark.parametrize("fan", [True, False])
def test_the_layer_and_not_the_file_says_which_way_round_it_lies(
    base_of: Callable[..., Path], tmp_path: Path, fan: bool
) -> None:
    base = base_of("gpt2")
    config = peft.LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    place = trained(base, tmp_path / "adapter", config)
    change_config(place, fan_in_fan_out=fan)
    assert_as_peft(base, place, tmp_path / "out")


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


TEXT = r".*language_model.*(q_proj|v_proj|down_proj)"
WRAPPERS = [
    ("gemma3", "", "AutoModelForCausalLM", TEXT),
    ("gemma3", "", "AutoModelForImageTextToText", ["q_proj", "v_proj"]),
    ("llama4", "Llama4ForConditionalGeneration", "AutoModelForCausalLM", ["q_proj", "v_proj"]),
    ("llama4", "Llama4ForConditionalGeneration", "Llama4ForConditionalGeneration", TEXT),
]


@pytest.mark.parametrize(("model", "whole", "kind", "targets"), WRAPPERS)
def test_an_adapter_of_any_class_of_a_vision_language_model_fits_its_base(
    base_of: Callable[..., Path], tmp_path: Path, model: str, whole: str, kind: str, targets: Any
) -> None:
    base = base_of(model, whole)
    place = trained(base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=targets), kind)
    assert_as_peft(base, place, tmp_path / "out", kind)


@pytest.mark.parametrize("model", ["gpt2", "bloom"])
def test_a_base_stored_without_the_models_prefix_takes_an_adapter(
    base_of: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    base = shutil.copytree(base_of(model), tmp_path / "published")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    targets = ["c_attn", "c_fc"] if model == "gpt2" else ["query_key_value"]
    assert_as_peft(base, trained(base, tmp_path / "a", peft.LoraConfig(r=4, target_modules=targets)), tmp_path / "out")


def stored_experts(base: Path, folder: Path, targets: list[str]) -> dict[str, torch.Tensor]:
    """An adapter on experts as peft saved it when each was a layer of its own; and what the merged file must hold."""
    folder.mkdir()
    right, factors = dict(load_file(base / "model.safetensors")), {}
    generator = torch.Generator().manual_seed(1)
    for name, weight in right.items():
        if name.endswith(tuple(f".{target}.weight" for target in targets)):
            a, b = (
                0.1 * torch.randn(shape, generator=generator) for shape in ((4, weight.shape[1]), (weight.shape[0], 4))
            )
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            right[name] = weight + 2 * (b @ a)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return right


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("mixtral", ["w1", "w2", "w3", "q_proj"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
        ("qwen2_moe", ["gate_proj", "up_proj", "down_proj", "gate", "o_proj"]),
        ("mixtral", ["w1"]),
        ("qwen2_moe", ["up_proj", "q_proj"]),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj", "kv_b_proj"]),
    ],
)
def test_an_adapter_on_experts_one_by_one_changes_each_by_its_product(
    base_of: Callable[..., Path], tmp_path: Path, model: str, targets: list[str]
) -> None:
    right = stored_experts(base_of(model), tmp_path / "adapter", targets)
    merged(base_of(model), tmp_path / "adapter", tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, right[name], atol=1e-6, rtol=1e-5)


OLD_NAMES = [
    ("gemma3", "", "model.language_model.", "language_model.model."),
    ("gemma3", "", "model.language_model.", "model."),  # as the language part by itself
    ("llava", "LlavaForConditionalGeneration", "model.language_model.", "language_model.model."),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", "model.language_model.", "model."),
    ("gpt_neox", "", "lm_head", "embed_out"),
]


@pytest.mark.parametrize("regex", [False, True])
@pytest.mark.parametrize(("model", "whole", "today", "once"), few(OLD_NAMES, 0, 4))
def test_an_adapter_with_the_names_of_an_older_transformers_merges_like_one_with_todays(
    base_of: Callable[..., Path], tmp_path: Path, model: str, whole: str, today: str, once: str, regex: bool
) -> None:
    base, layer = base_of(model, whole), "query_key_value" if model == "gpt_neox" else "v_proj"
    targets = f"({today}|.*{today}.*{layer})" if model == "gpt_neox" else f"{today}.*{layer}"
    config = peft.LoraConfig(r=4, target_modules=targets, alpha_pattern={f"{today}.*1.*{layer}": 3})
    place = trained(base, tmp_path / "today", config, whole or "AutoModelForCausalLM")
    old = shutil.copytree(place, tmp_path / "once")
    tensors = load_file(place / "adapter_model.safetensors")
    save_file({key.replace(today, once): value for key, value in tensors.items()}, old / "adapter_model.safetensors")
    names = targets.replace(today, once) if regex else [once] if model == "gpt_neox" else [layer]
    change_config(old, target_modules=names, alpha_pattern={f"{once}.*1.*{layer}": 3})
    for adapter in (place, old):
        merged(base, adapter, tmp_path / f"out-{adapter.name}")
    one, other = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("today", "once"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], tensor) for name, tensor in load_file(base / "model.safetensors").items())


@pytest.mark.parametrize("gone", [".1.self_attn.v_proj", "q_proj"], ids=["of a block", "of a kind"])
@pytest.mark.parametrize(("model", "whole", "today", "once"), [case for case in OLD_NAMES if case[0] != "gpt_neox"])
def test_an_adapter_of_old_names_that_lacks_a_layer_its_settings_call_for_is_refused(
    base_of: Callable[..., Path], tmp_path: Path, model: str, whole: str, today: str, once: str, gone: str
) -> None:
    config = peft.LoraConfig(r=4, target_modules=f"{today}.*(q_proj|v_proj)")
    place = trained(base_of(model, whole), tmp_path / "old", config, whole or "AutoModelForCausalLM")
    tensors = load_file(place / "adapter_model.safetensors")
    kept = {key.replace(today, once): value for key, value in tensors.items() if gone not in key}
    assert len(kept) < len(tensors)
    save_file(kept, place / "adapter_model.safetensors")
    change_config(place, target_modules=["q_proj", "v_proj"])
    said = refusal(base_of(model, whole), place)
    assert f"{gone}'" in said or f"'{gone}'" in said
    assert said.endswith("which its settings call for; the file is incomplete")


def test_an_adapter_on_experts_one_by_one_that_lacks_one_is_refused_but_for_blocks_that_were_left_out(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    stored_experts(base_of("mixtral"), tmp_path / "adapter", ["w1", "w2", "q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if ".1.block_sparse_moe.experts.2.w1." not in key}, file)
    assert "layers.1.block_sparse_moe.experts.2.w1', which its settings call for" in refusal(
        base_of("mixtral"), tmp_path / "adapter"
    )
    save_file({key: value for key, value in tensors.items() if ".layers.1." not in key}, file)
    refusal(base_of("mixtral"), tmp_path / "adapter")
    change_config(tmp_path / "adapter", layers_to_transform=[0])
    open_source(tmp_path / "adapter", base_of("mixtral"))


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        open_source(adapter, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def plain(base_of: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter to spoil."""
    base = base_of("llama")
    return base, trained(base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"arrow_config": {"top_k": 3}},
        {"megatron_config": {"hidden_size": 32}},
        {"a_field_of_tomorrow": 0.5},
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"r": True},
        {"alpha_pattern": None},
        {"rank_pattern": [4]},
        {"peft_type": "PREFIX_TUNING"},
        {"peft_type": "KIND_OF_TOMORROW"},
    ],
    ids=str,
)
def test_a_setting_that_is_not_understood_is_refused_by_its_name(plain: tuple[Path, Path], values: Any) -> None:
    change_config(plain[1], **values)
    [(field, value)] = values.items()
    assert field in refusal(*plain)
    assert value in refusal(*plain) if isinstance(value, str) else True


def test_what_says_nothing_about_the_weights_is_let_pass(plain: tuple[Path, Path]) -> None:
    values = {
        "revision": "main",
        "lora_dropout": 0.5,
        "corda_config": None,
        "a_field_of_tomorrow": False,
        "loftq_config": {},
    }
    change_config(plain[1], **values)
    assert len(open_source(plain[1], plain[0]).names) == 4


def spoil_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {f"other.{key}": value for key, value in tensors.items()}, "adapts 'other.base_model"),
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != f"{LAYER}.lora_B.weight"},
            "layers.1.self_attn.v_proj.lora_B",
        ),
        (lambda tensors: {k: v for k, v in tensors.items() if LAYER not in k}, "layers.1.self_attn.v_proj"),
        (
            lambda tensors: {**tensors, "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
            "up_proj",
        ),
        (lambda tensors: {**tensors, "base_model.model.value_head.weight": torch.ones(1, 32)}, "value_head"),
        (lambda tensors: {**tensors, f"{LAYER}.lora_B.weight": torch.ones(16, 5)}, "size mismatch for"),
        (lambda tensors: {}, "lora_A"),
    ],
    ids=[
        "another model",
        "half a layer",
        "without a layer",
        "a layer too many",
        "a module too many",
        "a shape",
        "nothing",
    ],
)
def test_an_adapter_that_fits_only_partly_is_refused_by_a_tensors_name(
    plain: tuple[Path, Path], change: Any, said: str
) -> None:
    spoil_tensors(plain[1], change)
    assert said in refusal(*plain)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens.weight"),
        ({"target_modules": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_a_change_of_one_of_two_tied_tensors_is_refused_by_its_name(
    base_of: Callable[..., Path], tmp_path: Path, values: dict[str, Any], name: str
) -> None:
    base = base_of("tied")
    place = trained(base, tmp_path / "adapter", peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **values}))
    assert f"changes '{name}', which the base ties to" in refusal(base, place)


def test_embeddings_with_more_rows_than_the_bases_are_refused_with_both_shapes(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    model = loaded(base)
    model.resize_token_embeddings(70)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    said = refusal(base, tmp_path / "adapter")
    assert re.search(r"'(model.embed_tokens|lm_head).weight' with the shape \[70, 32\], the base's is \[64, 32\]", said)


def test_a_bias_of_the_factors_needs_a_bias_in_the_base(base_of: Callable[..., Path], tmp_path: Path) -> None:
    place = trained(
        base_of("llama"), tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    )
    assert "q_proj.bias" in refusal(base_of("llama"), place)


def test_pickled_adapters_are_refused(plain: tuple[Path, Path]) -> None:
    torch.save(load_file(plain[1] / "adapter_model.safetensors"), plain[1] / "adapter_model.bin")
    (plain[1] / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(*plain)


def test_a_folder_of_several_adapters_says_where_they_are(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    trained(base, tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]), name="second")
    assert "'second'" in refusal(base, tmp_path / "a")


@pytest.mark.parametrize(
    ("named", "noted"),
    [("someone/another-7b", True), ("someone/BASE", False), ("/elsewhere/base/", False), (None, False)],
)
def test_an_adapter_of_another_base_is_said(plain: tuple[Path, Path], tmp_path: Path, named: Any, noted: bool) -> None:
    base = shutil.copytree(plain[0], tmp_path / "base")
    change_config(plain[1], base_model_name_or_path=named)
    notes = merged(base, plain[1], tmp_path / "out")
    assert [named in note and "'base'" in note for note in notes] == ([True] if noted else [])


def test_an_adapter_that_changes_nothing_at_all_is_refused(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    peft.get_peft_model(loaded(base), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    change_config(tmp_path / "a", base_model_name_or_path="someone/another-7b")
    assert re.search(r"changes nothing: .*another-7b", refusal(base, tmp_path / "a"))
