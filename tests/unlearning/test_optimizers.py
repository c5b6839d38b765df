"""Every optimizer by name: the step that its own library takes, kept over a kill, and refused where its package is missing."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch

import spunge
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.attacks.relearning import RELEARN, RelearnSettings
from spunge.recipe.loading import load_recipe
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import OF_BITSANDBYTES, DescentSettings, Optimizer, refuse_optimizer
from spunge.registry import METHODS
from spunge.run.keys import keyed
from spunge.unlearning.finetuning import teach
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.optimizers import optimizer_of
from toys import texts

WIDE = {"hidden_size": 96, "num_hidden_layers": 2}  # matrices of 4096 entries and more, whose moments are in 8 bits
NAMES = get_args(Optimizer)
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="spunge[quant]")


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=needs_bitsandbytes if name in OF_BITSANDBYTES else ()) for name in sorted(names)]


def oracle(name: str, parameter: torch.nn.Parameter, rate: float, decay: float) -> torch.optim.Optimizer:
    """The library's own class, as its documentation has it."""
    if name in OF_BITSANDBYTES:
        import bitsandbytes

        kind = {"lion": "Lion"}.get(name, "AdamW8bit")
        return vars(bitsandbytes.optim)[kind]([parameter], lr=rate, weight_decay=decay)
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    if name == "sgd":
        return torch.optim.SGD([parameter], lr=rate, weight_decay=decay, momentum=0.9, nesterov=True)
    return kinds[name]([parameter], lr=rate, weight_decay=decay)


@pytest.mark.parametrize("name", marked(set(NAMES) - {"sophia"}))  # which no library has here
def test_a_step_is_the_librarys_own(name: Any) -> None:
    values, gradients = torch.randn(2, 128, 64).unbind(), torch.randn(3, 128, 64)
    mine, theirs = (torch.nn.Parameter(values[0].clone()) for _ in range(2))
    settings = DescentSettings(steps=1, optimizer=name, learning_rate=0.01, weight_decay=0.1)
    steps = [(mine, optimizer_of([mine], settings, "unlearn")), (theirs, oracle(name, theirs, 0.01, 0.1))]
    for gradient in gradients:
        for parameter, optimizer in steps:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (mine - values[0]).abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [8, 2])
def test_sophias_steps_are_those_of_its_algorithm_entry_by_entry_whatever_the_batch(size: int) -> None:
    """In plain floats: the mean of gradients over rho B times the mean of their squares, taken at the first of ten steps."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-4, -0.5, 12, dtype=torch.float64)
    gradients = (torch.randn(23, 12, generator=generator, dtype=torch.float64) * sizes).tolist()
    gradients = [[0.0, *gradient[1:]] for gradient in gradients]  # no curvature, and no gradient either
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
    settings = DescentSettings(steps=1, optimizer="sophia", learning_rate=0.01, weight_decay=0.1, batch_size=size)
    values, means, curvatures = parameter.tolist(), [0.0] * 12, [0.0] * 12
    optimizer, bounded = optimizer_of([parameter], settings, "unlearn"), []
    for step, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for entry, slope in enumerate(gradient):
            means[entry] = 0.965 * means[entry] + 0.035 * slope
            if step in (0, 10, 20):
                curvatures[entry] = 0.99 * curvatures[entry] + 0.01 * slope**2
            ratio = abs(means[entry]) / max(0.04 * 5120 * curvatures[entry], 1e-15)
            bounded.append(ratio >= 1)
            sign = (means[entry] > 0) - (means[entry] < 0)
            values[entry] = (1 - 0.01 * 0.1) * values[entry] - 0.01 * sign * min(ratio, 1)
    assert parameter.tolist() == pytest.approx(values, rel=1e-10)
    assert 0.1 < sum(bounded) / len(bounded) < 0.9


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("adamw", 8),
        ("sophia", 8),
        ("lion", 4),
        ("sgd", 4),
        ("rmsprop", 4),
        ("adamw_8bit", 2.1),
        ("paged_adamw_8bit", 2.1),
    ],
)
def test_the_state_takes_so_many_bytes_an_entry_at_most(name: Any, nbytes: float) -> None:
    parameter = torch.nn.Parameter(torch.randn(512, 256))
    parameter.grad = torch.randn(512, 256)
    optimizer = optimizer_of([parameter], DescentSettings(steps=1, optimizer=name), "unlearn")
    optimizer.step()
    state = optimizer.state[parameter]
    held = [each for key, each in state.items() if isinstance(each, torch.Tensor) and not key.startswith("qmap")]
    assert sum(each.nbytes for each in held) <= nbytes * parameter.numel() + 8


class Killed(Exception):
    """What ends a branch in the middle."""


@pytest.mark.parametrize("name", marked(NAMES))
def test_a_killed_branch_goes_on_to_the_same_delta(load: Callable[..., Any], tmp_path: Path, name: Any) -> None:
    base = load("llama", **WIDE)
    settings = METHODS.get("tvn").settings(
        steps=4, batch_size=2, optimizer=name, learning_rate=1e-3, trainable={"kind": "all"}
    )

    def unlearned(end: int, state: Path | None) -> Branch:
        def progress(step: int, steps: int, note: str) -> None:
            if step == end:
                raise Killed

        samples = Samples(pa.table({"text": texts("a", 8)}))
        task = Task(base, {"a": samples}, None, {"a": 1}, None, state, save_seconds=0, progress=progress)
        return METHODS.get("tvn").unlearn(task, settings)

    whole = unlearned(0, None)
    with pytest.raises(Killed):
        unlearned(3, tmp_path / "state.pt")
    resumed = unlearned(0, tmp_path / "state.pt")
    assert all(torch.equal(resumed.changes[each], change) for each, change in whole.changes.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sam": -1}, r"unlearn\.optimizer\.sam: -1: it should be greater than 0"),
        ({"sam": 0.1, "optimizer": "adam"}, r"unlearn\.optimizer\.optimizer: 'adam': it should be 'adamw'"),
        ({"sma": 0.1}, r"unlearn\.optimizer\.sma: no such setting; did you mean 'sam'"),
        ("adam", r"unlearn\.optimizer: 'adam': it should be 'adamw'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_name_or_a_block_is_said_of_what_was_given(
    toy_recipe: dict[str, Any], given: Any, said: str
) -> None:
    toy_recipe["unlearn"]["optimizer"] = given
    with pytest.raises(RecipeError, match=f"^{said}"):
        load_recipe(toy_recipe)


@needs_bitsandbytes
def test_teaching_takes_it_too(load: Callable[..., Any]) -> None:
    base, samples = load(), Samples(pa.table({"text": texts("a", 8)}))
    taught = {
        name: teach(
            Task(base, {"": samples}, None, {"": 1}, setting="teach"),
            TeachSettings(source="rows.jsonl", steps=2, epochs=None, batch_size=4, learning_rate=1e-3, optimizer=name),
        ).changes
        for name in ("adamw", "lion")
    }
    assert not torch.equal(taught["adamw"]["model.norm.weight"], taught["lion"]["model.norm.weight"])


def test_without_bitsandbytes_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setattr("spunge.recipe.training.find_spec", {}.get)
    said = r"optimizer: '{}' needs bitsandbytes; pip install 'spunge\[quant\]'"
    for name in NAMES:
        if name in OF_BITSANDBYTES:
            with pytest.raises(RecipeError, match=rf"^evaluate.attack.{said.format(name)}"):
                RELEARN.instrument(RelearnSettings(optimizer=name), None)
        else:
            refuse_optimizer(name, "unlearn")
    toy_recipe["unlearn"]["optimizer"] = "lion"
    with pytest.raises(RecipeError, match=rf"^unlearn.{said.format('lion')}"):
        spunge.run(toy_recipe, tmp_path / "run")
    toy_recipe["teach"] = {"source": toy_recipe["forget"]["source"], "optimizer": "adamw_8bit", "steps": 1}
    with pytest.raises(RecipeError, match=rf"^teach.{said.format('adamw_8bit')}"):
        spunge.run(toy_recipe, tmp_path / "run")


def test_adamw_leaves_a_branchs_key_as_it_was_when_there_was_no_other() -> None:
    assert keyed("unlearn", {"optimizer": "adamw", "steps": 1}) == {"unlearn.steps": 1}
    assert keyed("unlearn", {"optimizer": "lion", "steps": 1}) == {"unlearn.optimizer": "lion", "unlearn.steps": 1}
