"""The functions of `import spunge` take a path as people give one: text or a Path."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import spunge
from spunge.merging.rules import TiesSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import write_delta
from spunge.weights.sources import DeltaSource

FUNCTIONS = [name for name in spunge.__all__ if not inspect.isclass(getattr(spunge, name)) and name != "run"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wherever_a_path_is_taken_text_is(name: str) -> None:
    hints = get_type_hints(getattr(spunge, name))
    hints.pop("return")
    only_paths = [
        key for key, hint in hints.items() if hint is Path or (Path in get_args(hint) and str not in get_args(hint))
    ]
    assert only_paths == []


def test_a_delta_and_a_merge_are_given_as_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.norm.weight"
    base = tiny("llama")
    checkpoint = Checkpoint(base)
    size = checkpoint.tensors[name].numel
    info: dict[str, Any] = {"base": checkpoint.fingerprint(), "method": "ga", "settings": {}, "parts": [], "seeds": {}}
    write_delta(tmp_path / "branch", {name: torch.full((size,), 0.5)}, info)
    delta = spunge.open_delta(str(tmp_path / "branch"))
    assert torch.equal(delta.dense(name), torch.full((size,), 0.5))
    spunge.merge(str(base), [DeltaSource(delta)], TiesSettings(density=1.0), str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(spunge.RecipeError, match=r"no delta\.json in"):
        spunge.open_delta(str(tmp_path / "nowhere"))
