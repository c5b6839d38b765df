"""Weights of equal shapes whose configurations make another function of them: transformers' own logits are the oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from making import noise, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.weights.opening import open_source

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, with the tokens [1 .. 20] its oracle reads."""
    folders = {}
    for kind in ("llama", "qwen2", "gemma2", "phi"):
        torch.manual_seed(0)
        values = {**TINY, "head_dim": 8} if kind in ("llama", "gemma2") else TINY
        config = transformers.AutoConfig.for_model(kind, **values)
        folders[kind] = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[kind])
    return folders


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        given: torch.Tensor = model(torch.arange(1, 21).unsqueeze(0)).logits
    return given


def with_values(folder: Path, out: Path, **values: Any) -> Path:
    shutil.copytree(folder, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, **values}))
    return out


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}),
    ("llama", {"hidden_act": "gelu"}),
    ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4},
    ),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
]
SAID: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta 500000.0 (base: 10000.0)"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": None},
        "factor 4.0 (base: null)",
    ),
    ("llama", {"rms_norm_eps": 0.1}, "rms_norm_eps 0.1 (base: 1e-06)"),
    ("gemma2", {"sliding_window": 4}, "sliding_window 4 (base: 4096)"),
]
SILENT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"use_cache": False, "eos_token_id": 5, "attention_dropout": 0.1, "torch_dtype": "bfloat16"}),
    ("llama", {"num_key_value_heads": 2, "head_dim": None, "_name_or_path": "elsewhere", "temperature": 0.5}),
    ("qwen2", {"transformers_version": "4.1", "initializer_range": 1.0, "pad_token_id": 0, "layer_types": None}),
]


def named(case: tuple[Any, ...]) -> str:
    return f"{case[0]}: {', '.join(case[1])}"


@pytest.mark.parametrize(("kind", "values"), REFUSED, ids=[named(case) for case in REFUSED])
def test_another_function_of_the_same_weights_is_refused(
    bases: dict[str, Path], tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    other = with_values(bases[kind], tmp_path / "other", **values)
    assert not torch.allclose(logits(bases[kind]), logits(other), atol=1e-3)
    with pytest.raises(RecipeError, match=r"^--model: 'other' has .* in its config.json, the base has .*same weights"):
        open_source(other, bases[kind])


@pytest.mark.parametrize(("kind", "values", "said"), SAID, ids=[named(case) for case in SAID])
def test_what_a_fine_tune_may_have_otherwise_is_said_in_one_line(
    bases: dict[str, Path], tmp_path: Path, kind: str, values: dict[str, Any], said: str
) -> None:
    other = with_values(bases[kind], tmp_path / "other", **values)
    assert not torch.allclose(logits(bases[kind]), logits(other), atol=1e-3)
    [note] = open_source(other, bases[kind]).notes
    assert note.startswith("config.json of 'other' differs from the base's, which is kept: ")
    assert said in note


@pytest.mark.parametrize(("kind", "values"), SILENT, ids=[named(case) for case in SILENT])
def test_what_leaves_the_function_as_it_is_is_not_said(
    bases: dict[str, Path], tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    other = with_values(bases[kind], tmp_path / "other", **values)
    assert torch.allclose(logits(bases[kind]).float(), logits(other).float(), atol=0.5)
    assert list(open_source(other, bases[kind]).notes) == []


def test_a_field_that_no_class_declares_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    other = with_values(bases["llama"], tmp_path / "other", my_multiplier=2)
    assert open_source(other, bases["llama"]).notes == [
        "config.json of 'other' differs from the base's, which is kept: my_multiplier 2 (base: null)"
    ]


def test_configurations_that_transformers_does_not_know_are_compared_as_written(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), heads=4, context=128)
    tuned = {name: tensor + noise(7, *tensor.shape).bfloat16() for name, tensor in weights().items()}

    def same(name: str, **config: Any) -> Any:
        return open_source(write_checkpoint(tmp_path / name, tuned, **config), base)

    assert list(same("same", heads=4, context=128).notes) == []
    assert "context null (base: 128)" in same("fewer", heads=4).notes[0]
    with pytest.raises(RecipeError, match=r"'other' has heads 8 in its config.json, the base has 4"):
        same("other", heads=8, context=128)
