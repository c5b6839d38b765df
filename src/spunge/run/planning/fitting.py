"""Whether a stage fits into a device's memory, and the setting that would make it fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from spunge.recipe.training import Everything, LoRA, Selected
from spunge.run.planning.estimate import Estimator
from spunge.run.planning.steps import Steps

GIB = 2**30
USABLE = 0.95  # share of a device's memory that a process is given


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


def fits(estimator: Estimator, memory: float) -> bool:
    return memory <= USABLE * estimator.device.memory


def unfit(stage: str, estimator: Estimator, steps: Steps | None, memory: float, block: str = "unlearn") -> Fit | None:
    """None for a stage that fits. steps: of one that trains; block: the recipe's, that says how."""
    if fits(estimator, memory):
        return None
    device = estimator.device
    about = f"{stage} takes about {memory / GIB:.1f} GiB, and {device.name} has {device.memory / GIB:.1f} GiB"
    if steps is None:
        setting = "model.path" if estimator.beside is None else "decode.path"
        return Fit(f"{setting}: {about} for judging; give a smaller model or another device", True)
    pieces = _pieces(estimator, steps) if device.gpu else None
    if pieces is not None:
        return Fit(f"{about}: each batch would be taken in {pieces} pieces, with the same gradient", False)
    taken: list[Change] = []
    for change in _changes(estimator, steps, block):
        needed = change.estimator.training(change.steps).memory
        if fits(estimator, needed):
            return Fit(f"{change.setting}: {about}; set it to {change.value} (about {needed / GIB:.1f} GiB)", True)
    for change in _together(estimator, steps, block):
        taken.append(change)
        needed = change.estimator.training(change.steps).memory
        if fits(estimator, needed):
            others = ", ".join(f"{each.setting}: {each.value}" for each in taken)
            return Fit(f"{taken[0].setting}: {about}; set {others} (about {needed / GIB:.1f} GiB)", True)
    return Fit(f"model.path: {about}, whatever is set; give a smaller model or another device", True)


def _pieces(estimator: Estimator, steps: Steps) -> int | None:
    """How many pieces of a batch fit; None where not even single samples do."""
    pieces = 2
    while pieces < 2 * max(rows.batch for rows in steps.rows.values()):
        if fits(estimator, estimator.training(_with_batch(steps, pieces)).memory):
            return pieces
        pieces *= 2
    return None


def _with_batch(steps: Steps, pieces: int) -> Steps:
    rows = {side: replace(each, batch=-(-each.batch // pieces)) for side, each in steps.rows.items()}
    return replace(steps, rows=rows)


def _changes(estimator: Estimator, steps: Steps, block: str) -> Iterator[Change]:
    """Each alone, the one that costs least first."""
    skeleton = estimator.skeleton
    if not skeleton.recomputed:
        changed = replace(skeleton, recomputed=True)
        yield Change("model.checkpoint_activations", "true", estimator.altered(skeleton=changed), steps)
    batch = size = steps.rows["forget"].batch
    while size > 1:
        size = -(-size // 2)
        yield Change(f"{block}.batch_size", str(size), estimator, _with_batch(steps, batch // size))
    if not isinstance(steps.what, LoRA):
        if steps.optimizer == "adamw" and not steps.further:
            yield Change(f"{block}.optimizer", "adamw_8bit", estimator, replace(steps, optimizer="adamw_8bit"))
        if isinstance(steps.what, Everything | Selected):
            yield Change(f"{block}.trainable", "{kind: lora}", estimator, replace(steps, what=LoRA()))
    elif estimator.train_in is None:
        yield Change("model.train_in", "4bit", estimator.altered(train_in="4bit"), steps)


def _together(estimator: Estimator, steps: Steps, block: str) -> Iterator[Change]:
    """One after the other, each beside those before it."""
    batch = steps.rows["forget"].batch
    if not estimator.skeleton.recomputed:
        estimator = estimator.altered(skeleton=replace(estimator.skeleton, recomputed=True))
        yield Change("model.checkpoint_activations", "true", estimator, steps)
    if batch > 1:
        steps = _with_batch(steps, batch)
        yield Change(f"{block}.batch_size", "1", estimator, steps)
    if isinstance(steps.what, Everything | Selected):
        steps = replace(steps, what=LoRA())
        yield Change(f"{block}.trainable", "{kind: lora}", estimator, steps)
    if isinstance(steps.what, LoRA) and estimator.train_in is None:
        estimator = estimator.altered(train_in="4bit")
        yield Change("model.train_in", "4bit", estimator, steps)
