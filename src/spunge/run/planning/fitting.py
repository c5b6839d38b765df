"""Whether a stage fits into a device's memory, and the setting that would make it fit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from spunge.recipe.training import Everything, LoRA, Selected
from spunge.run.planning.devices import USABLE, Spread
from spunge.run.planning.estimate import Estimator
from spunge.run.planning.steps import Steps, shared_out

GIB = 2**30
MOST_DEVICES = 16  # of one machine
MOST_PIECES = 16  # of a batch that is judged


class Change(NamedTuple):
    """A setting that takes less memory, and what is trained with it."""

    setting: str
    value: str
    estimator: Estimator
    steps: Steps


class Fit(NamedTuple):
    """What does not fit, in one line. `refused`: it cannot run; else it runs in pieces."""

    line: str
    refused: bool

    @property
    def mend(self) -> str:
        """What would mend it, or how it runs, without figures: alike for stages of which one line is enough."""
        return self.line.rpartition("; " if self.refused else ": ")[2].partition("(")[0]


def fits(estimator: Estimator, memory: float) -> bool:
    return memory <= USABLE * estimator.device.memory


def _fitting(estimator: Estimator, steps: Steps) -> float | None:
    """Bytes that a training takes, where they fit. No call is followed where what lies in memory before one does not fit."""
    if not fits(estimator, estimator.before_calls(steps)):
        return None
    needed = estimator.training(steps).memory
    return needed if fits(estimator, needed) else None


def unjudged(
    stage: str, estimator: Estimator, memory: float, again: Callable[[Estimator], float], spreads: bool = False
) -> Fit | None:
    """None for a stage of judging that fits. again: its bytes by another estimator. spreads: whether a judged model can lie on
    several devices and the machine's memory (model.device_map)."""
    if fits(estimator, memory):
        return None
    device, about = estimator.device, _about(stage, estimator, memory)
    for pieces in doublings(MOST_PIECES if device.gpu else 0):
        if fits(way := estimator.altered(pieces=pieces), needed := again(way)):
            return Fit(f"{about}: its batches would be taken in {pieces} pieces (about {needed / GIB:.1f} GiB)", False)
    if device.gpu and spreads and estimator.spread is None:
        way = estimator.altered(spread=Spread(1, math.inf))
        if fits(way, needed := again(way)):
            rest = "what the device does not hold of the model stays in the machine's memory"
            return Fit(f"model.device_map: {about}; set it to auto (about {needed / GIB:.1f} GiB): {rest}", True)
    setting = "model.path" if estimator.beside is None else "decode.path"
    return Fit(f"{setting}: {about}; give a smaller model or another device", True)


def doublings(most: int) -> Iterator[int]:
    """2, 4, 8 .. up to `most`."""
    return (2**power for power in range(1, most.bit_length()))


def _about(stage: str, estimator: Estimator, memory: float) -> str:
    device = estimator.device
    return f"{stage} takes about {memory / GIB:.1f} GiB, and {device.name} has {device.memory / GIB:.1f} GiB"


def unfit(
    stage: str, estimator: Estimator, steps: Steps, memory: float, block: str = "unlearn", shares: bool = False
) -> Fit | None:
    """None for a training that fits. block: the recipe's, that says how. shares: whether several devices can train it together
    (execution: {kind: sharded})."""
    if fits(estimator, memory):
        return None
    device, about = estimator.device, _about(stage, estimator, memory)
    pieces = _pieces(estimator, steps) if device.gpu and estimator.processes == 1 else None
    if pieces is not None:
        return Fit(f"{about}: each batch would be taken in {pieces} pieces, with the same gradient", False)
    taken: list[Change] = []
    for change in _changes(estimator, steps, block):
        if (needed := _fitting(change.estimator, change.steps)) is not None:
            return Fit(f"{change.setting}: {about}; set it to {change.value} (about {needed / GIB:.1f} GiB)", True)
    for change in _together(estimator, steps, block):
        taken.append(change)
        if (needed := _fitting(change.estimator, change.steps)) is not None:
            others = ", ".join(f"{each.setting}: {each.value}" for each in taken)
            return Fit(f"{taken[0].setting}: {about}; set {others} (about {needed / GIB:.1f} GiB)", True)
    # Packed weights cannot be shared out.
    shareable = [change for change in taken if change.setting != "model.train_in"]
    for count in range(len(shareable) + 1 if shares and device.gpu and estimator.train_in is None else 0):
        beside = shareable[:count]
        way, how = (beside[-1].estimator, beside[-1].steps) if beside else (estimator, steps)
        if (devices := devices_for(way, how, MOST_DEVICES)) is not None:
            others = "".join(f", {each.setting}: {each.value}" for each in beside)
            needed = way.altered(processes=devices).training(how).memory
            return Fit(
                f"execution.kind: {about}, which no other setting mends; set it to sharded, on {devices} of these devices (about "
                f"{needed / GIB:.1f} GiB of each){others}",
                True,
            )
    return Fit(f"model.path: {about}, whatever is set; give a smaller model or another device", True)


def devices_for(estimator: Estimator, steps: Steps, most: int) -> int | None:
    """How many devices that train a model together hold it, of 2, 4, 8 .. and more than there are; None where `most` don't."""
    more = (devices for devices in doublings(most) if devices > estimator.processes)
    return next((each for each in more if _fitting(estimator.altered(processes=each), steps) is not None), None)


def _pieces(estimator: Estimator, steps: Steps) -> int | None:
    """How many pieces of a batch fit; None where not even single samples do."""
    most = 2 * max(rows.batch for rows in steps.rows.values()) - 1
    return next((each for each in doublings(most) if _fitting(estimator, shared_out(steps, each)) is not None), None)


def _changes(estimator: Estimator, steps: Steps, block: str) -> Iterator[Change]:
    """Each alone, the one that costs least first."""
    skeleton = estimator.skeleton
    if not skeleton.recomputed:
        changed = replace(skeleton, recomputed=True)
        yield Change("model.checkpoint_activations", "true", estimator.altered(skeleton=changed), steps)
    batch = size = steps.rows["forget"].batch
    while size > 1:
        size = -(-size // 2)
        yield Change(f"{block}.batch_size", str(size), estimator, shared_out(steps, batch // size))
    if not isinstance(steps.what, LoRA):
        if steps.optimizer == "adamw" and not steps.further:
            yield Change(f"{block}.optimizer", "adamw_8bit", estimator, replace(steps, optimizer="adamw_8bit"))
        if isinstance(steps.what, Everything | Selected):
            yield Change(f"{block}.trainable", "{kind: lora}", estimator, replace(steps, what=LoRA()))
    elif estimator.train_in is None and estimator.processes == 1:
        yield Change("model.train_in", "4bit", estimator.altered(train_in="4bit"), steps)


def _together(estimator: Estimator, steps: Steps, block: str) -> Iterator[Change]:
    """One after the other, each beside those before it."""
    batch = steps.rows["forget"].batch
    if not estimator.skeleton.recomputed:
        estimator = estimator.altered(skeleton=replace(estimator.skeleton, recomputed=True))
        yield Change("model.checkpoint_activations", "true", estimator, steps)
    if batch > 1:
        steps = shared_out(steps, batch)
        yield Change(f"{block}.batch_size", "1", estimator, steps)
    if isinstance(steps.what, Everything | Selected):
        steps = replace(steps, what=LoRA())
        yield Change(f"{block}.trainable", "{kind: lora}", estimator, steps)
    if isinstance(steps.what, LoRA) and estimator.train_in is None and estimator.processes == 1:
        estimator = estimator.altered(train_in="4bit")
        yield Change("model.train_in", "4bit", estimator, steps)
