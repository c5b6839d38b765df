"""What never changes of a text is computed once, and a delta does not depend on when."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from spunge.data.samples import Samples
from spunge.model.architecture import find_blocks
from spunge.model.loading import load_base
from spunge.recipe.model import ModelSettings
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.rmu.rmu import RMU
from spunge.unlearning.rmu.settings import RMUSettings
from toys import ARCHITECTURES, texts

# More rows than a group, of very different lengths.
FORGET = Samples(pa.table({"text": [" ".join(texts(f"forget {row}", 1 + row % 3)) for row in range(10)]}))
RETAIN = Samples(pa.table({"text": [" ".join(texts(f"retain {row}", 1 + row % 4)) for row in range(11)]}))


@pytest.fixture
def rounded(tiny: Callable[..., Path]) -> Any:
    """A tiny model in bfloat16, where another order of additions shows."""
    folder = tiny("llama")
    return load_base(folder, ModelSettings(path=str(folder), dtype="bfloat16"))


def settings(**changes: Any) -> RMUSettings:
    given = {"layer": 3, "steps": 8, "batch_size": 4, "learning_rate": 1e-3, "alpha": 10.0, **changes}
    return RMUSettings.model_validate(given)


def task(base: Any, **changes: Any) -> Task:
    return replace(Task(base, {"a": FORGET}, RETAIN, {"a": 7}), **changes)


def dense(branch: Branch) -> dict[str, torch.Tensor]:
    return {name: change for name, change in branch.changes.items() if isinstance(change, torch.Tensor)}


@pytest.mark.parametrize("coefficient", [6.5, {"relative": 5.0}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeping_activations_changes_nothing_beyond_rounding(
    load: Callable[..., Any], architecture: str, coefficient: Any
) -> None:
    base, given = load(architecture), settings(coefficient=coefficient)
    store: dict[Any, Any] = {}
    found, expected = dense(RMU.unlearn(task(base, kept=store), given)), dense(RMU.unlearn(task(base), given))
    assert store
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(found[name], change, rtol=2e-3, atol=4e-6)


def test_adapters_are_trained_alike_with_activations_kept(load: Callable[..., Any]) -> None:
    base, given = load("llama"), settings(trainable={"kind": "lora", "rank": 4, "dropout": 0.0})
    store: dict[Any, Any] = {}
    found, expected = RMU.unlearn(task(base, kept=store), given), RMU.unlearn(task(base), given)
    assert {key[-1] for key in store} == {"base"}  # no block is frozen
    for name, change in expected.changes.items():
        torch.testing.assert_close(found.changes[name].dense(), change.dense(), rtol=2e-3, atol=4e-6)


def test_a_delta_is_the_same_bit_for_bit_whatever_was_kept_before_it(rounded: Any) -> None:
    base, store = rounded, {}
    first = dense(RMU.unlearn(task(base, kept=store), settings()))
    other = {"b": Samples(pa.table({"text": texts("others", 9)}))}
    RMU.unlearn(task(base, parts=other, seeds={"b": 3}, kept=store), settings())
    again = dense(RMU.unlearn(task(base, kept=store), settings()))
    assert first
    assert all(torch.equal(change, again[name]) for name, change in first.items())


class Killed(Exception):
    pass


def test_a_killed_branch_goes_on_to_the_same_delta_with_nothing_kept_yet(rounded: Any, tmp_path: Path) -> None:
    base = rounded
    whole = dense(RMU.unlearn(task(base, kept={}), settings()))

    def kill(step: int, *_: Any) -> None:
        if step == 5:
            raise Killed

    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        RMU.unlearn(task(base, kept={}, state=state, save_seconds=0.0, progress=kill), settings())
    assert state.exists()
    rest = dense(RMU.unlearn(task(base, kept={}, state=state), settings()))
    assert all(torch.equal(change, rest[name]) for name, change in whole.items())


def test_a_text_passes_the_frozen_blocks_once(load: Callable[..., Any]) -> None:
    base = load("llama")
    seen: list[int] = []
    hook = find_blocks(base.model)[0].mlp.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    store: dict[Any, Any] = {}
    try:
        RMU.unlearn(task(base, kept=store), settings())
        once = sum(seen)
        RMU.unlearn(task(base, kept=store), settings())
    finally:
        hook.remove()
    look = 2  # each run looks with one text at how the blocks give their outputs, and whether they give the same one by one
    assert once == len(FORGET) + len(RETAIN) + look
    assert sum(seen) == once + look


@pytest.mark.parametrize(
    ("what", "kept"),
    [({"keep_activations": 0.0}, 0), ({"steps": 1}, 0), ({"keep_activations": 1e-6}, 0), ({}, 4)],
)
def test_activations_are_kept_where_they_fit_and_come_again(
    load: Callable[..., Any], what: dict[str, Any], kept: int
) -> None:
    base, store = load("llama"), {}
    RMU.unlearn(task(base, kept=store), settings(**what))
    assert len(store) == kept
    assert all(rows for rows in store.values())
