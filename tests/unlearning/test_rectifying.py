"""SAM and GRU against plain floats on losses that can be written down, and through a kill."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from spunge.data.samples import Samples
from spunge.model.ranks import Ranks
from spunge.registry import METHODS
from spunge.unlearning import loop
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Task
from toys import texts

START = [0.5, -1.0, 2.0]
BENT = [[2.0, 0.3, 0.0], [0.3, -1.0, 0.5], [0.0, 0.5, 1.5]]  # of the forget loss: neither a bowl nor a hill
SLOPE = [0.4, -0.2, 0.7]
KEPT = [1.0, -2.0, 4.0]  # where the retain loss is least
NEAR = [-1.0, -3.0, 0.0]  # least where the forget loss falls to
RATE, RHO = 0.05, 0.3


def trained(steps: int, gru: float | None = None, aim: Sequence[float] = KEPT, **changes: Any) -> list[float]:
    """What the loop makes of START, minimising w A w / 2 + b w and 0.7 |w - c|^2 / 2 by SGD."""
    weights = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    bent, slope, kept = (torch.tensor(values, dtype=torch.float64) for values in (BENT, SLOPE, aim))

    def forget(_number: int) -> Loss:
        return Loss(weights @ bent @ weights / 2 + slope @ weights, {})

    def retain(_number: int) -> Loss:
        return Loss(0.7 * (weights - kept).square().sum() / 2, {})

    def both(number: int) -> Loss:
        return Loss(forget(number).total + retain(number).total, {})

    base: Any = SimpleNamespace(ranks=Ranks(), device=torch.device("cpu"), autocast=nullcontext)
    settings = TrainingSettings(method="none", steps=steps, learning_rate=RATE, **changes)
    told: list[str] = []
    task = Task(base, {}, None, {}, progress=lambda step, steps, note: told.append(note))
    Loop(task, settings, [weights], both, steps, [], apart=(forget, retain), gru=gru).run()
    first = forget_at(START)[0] + (0 if gru else 0.7 * np.square(np.subtract(START, aim)).sum() / 2)
    assert told[0].startswith(f"loss {first:.4g}")
    return weights.tolist()


def forget_at(weights: Any) -> tuple[float, Any]:
    """The forget loss and its gradient."""
    w, a, b = np.array(weights), np.array(BENT), np.array(SLOPE)
    return float(w @ a @ w / 2 + b @ w), a @ w + b


def retain_slope(weights: Any, aim: Sequence[float] = KEPT) -> Any:
    return 0.7 * (np.array(weights) - np.array(aim))


def descended(gradient: Callable[[Any, int], Any], steps: int) -> list[float]:
    """SGD with Nesterov's momentum of 0.9."""
    weights, momentum = np.array(START), np.zeros(3)
    for step in range(steps):
        g = gradient(weights, step)
        momentum = 0.9 * momentum + g
        weights = weights - RATE * (g + 0.9 * momentum)
    return [float(value) for value in weights]


def steepest(weights: Any) -> Any:
    g = forget_at(weights)[1]
    return forget_at(weights + RHO * g / math.sqrt(float(g @ g)))[1]


def test_sam_takes_the_forget_gradient_alone_where_its_loss_is_highest() -> None:
    expected = descended(lambda w, _: steepest(w) + retain_slope(w), 4)
    assert trained(4, optimizer={"sam": RHO, "optimizer": "sgd"}) == pytest.approx(expected, rel=1e-9)
    plain = descended(lambda w, _: forget_at(w)[1] + retain_slope(w), 4)
    assert trained(4, optimizer="sgd") == pytest.approx(plain, rel=1e-9)
    assert max(abs(one - other) for one, other in zip(expected, plain, strict=True)) > 0.01


@pytest.mark.parametrize("aim", [KEPT, NEAR], ids=["against", "along"])
@pytest.mark.parametrize("sharp", [False, True])
def test_gru_steps_along_the_forget_gradient_without_what_raises_the_retain_loss(sharp: bool, aim: list[float]) -> None:
    mean, against = np.zeros(3), []

    def gradient(weights: Any, _step: int) -> Any:
        nonlocal mean
        g = steepest(weights) if sharp else forget_at(weights)[1]
        mean = 0.2 * mean + 0.8 * retain_slope(weights, aim)
        against.append(float(g @ mean))
        return g - min(0.0, against[-1]) / float(mean @ mean) * mean

    expected = descended(gradient, 12)
    optimizer = {"sam": RHO, "optimizer": "sgd"} if sharp else "sgd"
    assert trained(12, gru=0.8, aim=aim, optimizer=optimizer) == pytest.approx(expected, rel=1e-9)
    assert (against[0] < 0) == (aim is KEPT)


def test_a_step_that_is_done_again_for_want_of_memory_counts_once_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the step the memory ends."""
    expected = trained(4, gru=0.8, optimizer="sgd")
    whole, calls = loop.rectified, []

    def short(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(*given)

    monkeypatch.setattr(loop, "rectified", short)
    monkeypatch.setattr(Loop, "_halve", lambda self: self.optimizer.zero_grad())
    assert trained(4, gru=0.8, optimizer="sgd") == pytest.approx(expected, rel=1e-12)
    assert len(calls) == 5


class Killed(Exception):
    """What ends a branch in the middle."""


def test_a_killed_branch_goes_on_to_the_same_delta_with_both(load: Callable[..., Any], tmp_path: Path) -> None:
    base = load("gpt2")  # with dropout of its own
    forget, retain = (Samples(pa.table({"text": texts(topic, 8)})) for topic in ("a", "other"))

    def unlearned(end: int, state: Path | None, **changes: Any) -> Branch:
        def progress(step: int, steps: int, note: str) -> None:
            if step == end:
                raise Killed

        task = Task(base, {"a": forget}, retain, {"a": 1}, None, state, save_seconds=0, progress=progress)
        given = {"steps": 3, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "max_damage": None}
        return METHODS.get("npo").unlearn(task, METHODS.get("npo").settings(**given, **changes))

    both = {"optimizer": {"sam": 0.05}, "gru": 0.5}
    whole = unlearned(0, None, **both)
    with pytest.raises(Killed):
        unlearned(2, tmp_path / "state.pt", **both)
    resumed = unlearned(0, tmp_path / "state.pt", **both)
    assert all(torch.equal(resumed.changes[name].dense(), each.dense()) for name, each in whole.changes.items())
    other = unlearned(0, None, optimizer={"sam": 0.05})
    assert any(not torch.equal(other.changes[name].dense(), each.dense()) for name, each in whole.changes.items())


def test_gru_without_a_retain_term_is_refused() -> None:
    for method, alpha in (("graddiff", 0), ("ga", 0)):
        with pytest.raises(ValidationError, match="gru: there is no retain term to hold"):
            METHODS.get(method).settings(method=method, alpha=alpha, gru=0.8)
    with pytest.raises(ValidationError, match="gru: pdu weighs its retain term by how far"):
        METHODS.get("pdu").settings(method="pdu", gru=0.8)
