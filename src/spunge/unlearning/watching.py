"""A model measured while it trains: before the first step, every so many steps and after the last; and the step that is kept.

Measuring changes nothing of the training: no weight, and no random number that it draws.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.model.loading import Base
from spunge.results import Wanted
from spunge.unlearning.trained import evaluation_mode


class Reading(NamedTuple):
    """A metric at one step, with its 95% interval, NaN where there is none, and which way is good: up, down or near a target."""

    value: float
    low: float
    high: float
    wanted: Wanted | None
    target: float | None = None


Readings = tuple[Reading, ...]  # one of each curve


@dataclass(frozen=True)
class Watch:
    """What a training is measured by on its way."""

    every: int  # steps between two measurements
    names: Sequence[str]  # of the curves
    # (model, step) -> the readings of what would be saved after that step. Raises RecipeError where it cannot be measured.
    measure: Callable[[Base, int], Readings]
    key: str  # fingerprint of what is measured: readings of another are not gone on from
    # (readings, those before the first step) -> the greater the better; the first of equal steps is kept. None: the last step.
    rank: Callable[[Readings, Readings], tuple[float, ...]] | None = None


class Point(NamedTuple):
    step: int
    readings: Readings


@dataclass(frozen=True)
class Watched:
    """What became of a watch. `seconds`: that measuring took, which the training's do not hold."""

    points: tuple[Point, ...]
    kept: int  # the step whose weights are saved
    trained: int  # the last step
    seconds: float


class Best(NamedTuple):
    step: int
    weights: list[Tensor]
    losses: dict[str, float]


@dataclass
class Watching:
    """A watch at work on the parameters that a loop trains. as_saved: inside it, the model in memory is what would be saved."""

    watch: Watch
    base: Base
    parameters: Sequence[nn.Parameter]
    as_saved: Callable[[], AbstractContextManager[Any]]
    points: list[Point] = field(default_factory=list)
    best: Best | None = None
    held: Best | None = None  # the best up to the last good step, where `best` came after it
    seconds: float = 0.0

    def is_due(self, step: int, last: bool) -> bool:
        """Whether the model is to be measured after a step. last: no other step follows."""
        return (last or step % self.watch.every == 0) and (not self.points or self.points[-1].step != step)

    def look(self, step: int, losses: dict[str, float], good: int = 0) -> str:
        """Measure the model after a step, and hold its weights where it is the best so far. good: the step that the training would
        go back to, whose best is then still there. Returns what to tell of it."""
        started = time.perf_counter()
        with _undisturbed(self.base), self.as_saved():
            readings = self.watch.measure(self.base, step)
        self.points.append(Point(step, readings))
        if self._best_step() == step:
            self._hold(step, losses, good)
        self.seconds += time.perf_counter() - started
        return ", ".join(
            f"{name} {reading.value:.4g}" for name, reading in zip(self.watch.names, readings, strict=True)
        )

    def _hold(self, step: int, losses: dict[str, float], good: int) -> None:
        """These weights are the best."""
        spare = self.best
        if self.best is not None and self.best.step <= good:
            spare, self.held = self.held, self.best
        weights = spare.weights if spare else [torch.empty_like(parameter) for parameter in self.parameters]
        for value, parameter in zip(weights, self.parameters, strict=True):
            value.copy_(parameter.detach())
        self.best = Best(step, weights, losses)

    def _best_step(self) -> int | None:
        """Of those so far; None where the last step is kept. The base itself is none of them."""
        rank, steps = self.watch.rank, [point for point in self.points if point.step > 0]
        if rank is None or not steps:
            return None
        before = self.points[0].readings
        return max(steps, key=lambda point: rank(point.readings, before)).step

    def go_back(self, step: int) -> None:
        """The weights are those after an earlier step again: what came after it is forgotten."""
        self.points = [point for point in self.points if point.step <= step]
        if self.best is not None and self.best.step > step:
            self.best, self.held = self.held, None

    def ended(self, step: int, losses: dict[str, float]) -> tuple[Watched, dict[str, float]]:
        """Put the best weights back after the last step. Returns what became of the watch, and the losses of the step that is
        kept."""
        points, best = tuple(self.points), self.best
        if best is None:
            return Watched(points, step, step, self.seconds), losses
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best.weights, strict=True):
                parameter.copy_(value)
        return Watched(points, best.step, step, self.seconds), best.losses

    def state(self) -> dict[str, Any]:
        """For the saved state of a training, as plain values."""
        points = [(point.step, [tuple(reading) for reading in point.readings]) for point in self.points]
        best, held = (
            each and (each.step, [value.cpu() for value in each.weights], dict(each.losses))
            for each in (self.best, self.held)
        )
        return {"key": self.watch.key, "points": points, "best": best, "held": held}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved state; where it is of another watch, or of none, begin anew."""
        if state is None or state["key"] != self.watch.key:
            return
        self.points = [Point(step, tuple(Reading(*each) for each in readings)) for step, readings in state["points"]]
        self.best, self.held = (self._there(state.get(name)) for name in ("best", "held"))

    def _there(self, saved: tuple[int, list[Tensor], dict[str, float]] | None) -> Best | None:
        """What a saved state holds, where the parameters are."""
        if saved is None:
            return None
        step, weights, losses = saved
        moved = zip(weights, self.parameters, strict=True)
        return Best(step, [value.to(parameter.device) for value, parameter in moved], losses)


@contextmanager
def _undisturbed(base: Base) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode, and random numbers are drawn from a generator of its own."""
    with (
        torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []),
        evaluation_mode(base.model),
    ):
        yield
