"""A delta is read as it was written, or refused in one line that says what does not fit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from making import noise
from spunge.errors import RecipeError
from spunge.weights.delta import LowRank, Sparse, open_delta, write_delta

INFO = {"base": "0" * 64, "method": "mine"}


def changes() -> dict[str, Any]:
    """A change of each kind; the sparse one does not fill its last byte."""
    sparse = noise(3, 3, 7) * (noise(4, 3, 7) > 0.5)
    return {
        "dense.weight": noise(0, 4, 6),
        "lora.weight": LowRank(noise(1, 2, 6), noise(2, 4, 2), 0.5),
        "conv.weight": LowRank(noise(5, 2, 6), noise(6, 4, 2), 2.0, transposed=True),
        "sparse.weight": Sparse.of(sparse),
    }


def test_every_kind_of_change_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", changes(), INFO)
    delta = open_delta(tmp_path / "d")
    assert list(delta.tensors) == list(changes())
    assert {key: delta.info[key] for key in INFO} == INFO
    for name, change in changes().items():
        expected = change if isinstance(change, torch.Tensor) else change.dense()
        assert torch.equal(delta.dense(name), expected)
        assert delta.tensors[name]["shape"] == list(expected.shape)
    assert torch.equal(delta.dense("conv.weight"), 2.0 * (noise(6, 4, 2) @ noise(5, 2, 6)).T)


def test_a_change_is_stored_in_float32_whatever_it_was(tmp_path: Path) -> None:
    half = noise(0, 4, 6).bfloat16()
    write_delta(tmp_path / "d", {"a": half}, INFO)
    assert load_file(tmp_path / "d" / "delta.safetensors")["a"].dtype == torch.float32
    assert torch.equal(open_delta(tmp_path / "d").dense("a"), half.float())


def test_what_did_not_change_is_left_out(tmp_path: Path) -> None:
    zero = LowRank(noise(1, 2, 6), torch.zeros(4, 2), 1.0)
    delta = write_delta(tmp_path / "d", {"a": noise(0, 2), "b": torch.zeros(3), "c": zero}, INFO)
    assert list(delta.tensors) == ["a"]
    with pytest.raises(RecipeError, match="nothing was changed"):
        write_delta(tmp_path / "e", {"b": torch.zeros(3)}, INFO)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(RecipeError, match="the change of 'a' is not finite"):
        write_delta(tmp_path / "d", {"a": torch.tensor([1.0, value])}, INFO)
    assert not (tmp_path / "d").exists()


def test_a_deltas_files_have_the_mode_that_the_users_mask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_delta(tmp_path / "d", changes(), INFO)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "d").iterdir()} == {0o640}


def described(name: str, **values: Any) -> Callable[[Path], Any]:
    """Change an entry of delta.json."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "delta.json").read_text())
        content["tensors"][name].update(values)
        (folder / "delta.json").write_text(json.dumps(content))

    return spoil


def stored(**values: Any) -> Callable[[Path], Any]:
    """Change tensors of delta.safetensors; None takes one away."""

    def spoil(folder: Path) -> None:
        tensors = {
            **load_file(folder / "delta.safetensors"),
            **{key.replace("__", "."): v for key, v in values.items()},
        }
        save_file({key: value for key, value in tensors.items() if value is not None}, folder / "delta.safetensors")

    return spoil


def text(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "delta.json").write_text(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda folder: (folder / "delta.json").unlink(), "no delta.json"),
    "no tensors' file": (lambda folder: (folder / "delta.safetensors").unlink(), "delta.safetensors is missing"),
    "a description cut short": (text('{"format": 1, "ten'), "delta.json in .* cannot be read"),
    "a description that is a list": (text("[]"), "holds no JSON object"),
    "another format": (text('{"format": 2, "tensors": {}}'), "has format 2"),
    "a description without tensors": (text('{"format": 1}'), "says of no tensor"),
    "tensors as a list": (text('{"format": 1, "tensors": ["a"]}'), "says of no tensor"),
    "the description of nothing": (text('{"format": 1, "tensors": {}}'), "says nothing of tensor"),
    "an unknown kind": (described("dense.weight", kind="ternary"), "of the kind 'ternary'"),
    "another kind": (described("dense.weight", kind="lora"), r"no tensor 'dense\.weight\.lora_A'"),
    "a shape that is no list": (described("dense.weight", shape=24), "has the shape 24"),
    "a negative shape": (described("dense.weight", shape=[-4, 6]), r"has the shape \[-4, 6\]"),
    "another dense shape": (described("dense.weight", shape=[6, 4]), r"stored with the shape \[4, 6\]"),
    "another low-rank shape": (described("lora.weight", shape=[6, 4]), r"give \[4, 6\]"),
    "a low-rank change the other way round": (described("conv.weight", transposed=False), r"give \[4, 6\]"),
    "no scale": (described("lora.weight", scale=None), "the scale None"),
    "a scale that is not a number": (described("lora.weight", scale=float("nan")), "the scale nan"),
    "another sparse shape": (described("sparse.weight", shape=[30, 7]), "the mask and the values"),
    "a factor that is missing": (stored(lora__weight__lora_B=None), r"no tensor 'lora\.weight\.lora_B'"),
    "factors of two ranks": (stored(lora__weight__lora_B=torch.ones(4, 3)), "do not multiply"),
    "integers": (stored(dense__weight=torch.ones(4, 6, dtype=torch.int32)), "stored as torch.int32"),
    "a mask of numbers": (stored(sparse__weight__mask=torch.ones(3)), "stored as torch.float32"),
    "a tensor that nobody describes": (stored(more=torch.ones(2)), "says nothing of tensor 'more'"),
    "tensors cut short": (
        lambda folder: os.truncate(folder / "delta.safetensors", 300),
        "delta.safetensors is truncated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_delta_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, said = DAMAGES[case]
    write_delta(tmp_path / "d", changes(), INFO)
    spoil(tmp_path / "d")
    with pytest.raises(RecipeError, match=said) as caught:
        open_delta(tmp_path / "d", "--model")
    assert str(caught.value).startswith("--model: ")
    assert "\n" not in str(caught.value)


def test_a_mask_that_counts_other_values_than_there_are_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", changes(), INFO)
    values = load_file(tmp_path / "d" / "delta.safetensors")["sparse.weight.values"]
    stored(sparse__weight__values=values[:-1].clone())(tmp_path / "d")
    delta = open_delta(tmp_path / "d")
    with pytest.raises(RecipeError, match=r"delta\.safetensors in .* is damaged: 'sparse\.weight'"):
        delta.change("sparse.weight")
