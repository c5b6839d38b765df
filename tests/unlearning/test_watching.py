"""The best step of a watched training, also of one that goes back to earlier weights."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spunge.unlearning.watching import Reading, Readings, Watch, Watching

VALUES = [0.0, 0.3, 0.6, 0.5, 0.7, 0.9, 0.95, 0.2]  # of each step


def watching(parameter: nn.Parameter) -> Watching:
    def measure(_base: Any, step: int) -> Readings:
        return (Reading(VALUES[step], math.nan, math.nan, "up"),)

    watch = Watch(every=1, names=["m"], measure=measure, key="k", rank=lambda readings, _before: (readings[0].value,))
    base: Any = SimpleNamespace(device=torch.device("cpu"), model=nn.Linear(1, 1))
    return Watching(watch, base, [parameter], nullcontext)


@pytest.mark.parametrize("saved_at", [None, 1, 4, 6])
@pytest.mark.parametrize(
    ("good", "expected"),
    [
        ({3: 3}, 2),  # the last good step is worse than one before it
        ({3: 3, 5: 5}, 5),
        ({2: 2, 4: 4}, 4),
        ({1: 1}, 1),
        ({3: 3, 6: 6}, 6),
    ],
)
def test_what_goes_back_keeps_the_best_step_up_to_there(
    good: dict[int, int], expected: int, saved_at: int | None
) -> None:
    """good: the step from which on a training would go back to a step."""
    parameter = nn.Parameter(torch.zeros(2))
    watched, last = watching(parameter), 0
    for step in range(len(VALUES)):
        parameter.data.fill_(step)
        watched.look(step, {"loss": float(step)}, last)
        last = good.get(step, last)
        if step == saved_at:
            state = watched.state()
            watched = watching(parameter)
            watched.resume(state)
    watched.go_back(last)
    parameter.data.fill_(last)
    if watched.is_due(last, last=True):
        watched.look(last, {"loss": float(last)}, last)
    told, losses = watched.ended(last, {"loss": float(last)})
    assert expected == max(range(1, last + 1), key=VALUES.__getitem__)
    assert (told.kept, losses) == (expected, {"loss": float(expected)})
    assert parameter.tolist() == [expected, expected]
