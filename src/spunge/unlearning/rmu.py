"""RMU, representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218, section 4).

With M_u and M_0 the hidden states after block l of the trained model and of the base, u a fixed random unit vector:

    loss = mean over forget tokens |M_u - c u|^2 / d  +  alpha * mean over retain tokens |M_u - M_0|^2 / d

Only the MLP output projections of blocks l-2, l-1 and l are trained (of all experts, in a mixture of them). Both terms are
divided by the hidden size d (as the reference code does; the paper divides by neither), so alpha means the same in both.
Padding enters neither term; the reference code averages over it.

    spunge run demo --set unlearn.method=rmu
    spunge run demo --set unlearn.layer=auto --set unlearn.coefficient=auto
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spunge.models import Base, down_projections, find_blocks
from spunge.recipe import Strict
from spunge.registry import RecipeError
from spunge.texts import Batch, Samples
from spunge.unlearning.batches import Stream, interleaved
from spunge.unlearning.feed import part_stream, retain_stream
from spunge.unlearning.kept import Activations
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Settled, Task
from spunge.unlearning.trained import Trainable, training, training_tensors
from spunge.unlearning.trunk import Entered, Trunk

TRAINED_BLOCKS = 3
TYPICAL_LAYER = 0.23  # share of the depth: block 7 of Zephyr's 32

# Of the method's authors, for the joint run; epochs and min_cosine are SPUNGE's, for a part.
_ZEPHYR: dict[str, Any] = {
    "layer": 7,
    "coefficient": 6.5,
    "alpha": 1200.0,
    "learning_rate": 5e-5,
    "batch_size": 4,
    "skip_first": 0,
    "joint_steps": 150,
    "epochs": 2.0,
    "steps": None,
    "min_cosine": 0.5,
    "max_length": 512,
    "max_lengths": {"bio": 512, "cyber": 768, "retain": 512},
}
PRESETS: dict[str, dict[str, Any]] = {
    "zephyr-7b": _ZEPHYR,
    # As published with `--param_ids 7`, which picks a single matrix of one expert by its position in the block;
    # here the output projections of all experts are trained.
    "mixtral-8x7b": {**_ZEPHYR, "coefficient": 300.0, "alpha": 1600.0},
    # What the published script does when it is told nothing.
    "reference": {
        **{key: value for key, value in _ZEPHYR.items() if key != "min_cosine"},
        "coefficient": 20.0,
        "alpha": 100.0,
        "joint_steps": 80,
        "epochs": None,
        "steps": 80,
    },
}


class Relative(Strict):
    relative: float = Field(
        5.0, gt=0, description="c is so many times the norm of the base's hidden state, token by token."
    )


class RMUSettings(TrainingSettings):
    method: Literal["rmu"] = "rmu"
    preset: Literal["zephyr-7b", "mixtral-8x7b", "reference"] | None = Field(
        None,
        description="Published numbers for every setting that the recipe does not give; reference: the script's own defaults.",
    )
    layer: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        TYPICAL_LAYER,
        description="l: the block whose output is steered, as an index from 0 or, below 1, a share of the depth. auto: chosen by "
        "short trials, once for all of a run.",
    )
    coefficient: float | Relative | Literal["auto"] = Field(
        default=Relative(),
        description="c: the length of the target. A number as published (Zephyr-7b: 6.5), or {relative: 5}, which fits any model. "
        "auto: a relative one, chosen by short trials.",
    )
    alpha: float = Field(
        100.0,
        ge=0,
        description="Weight of the retain term, both terms being means over tokens and hidden size (Zephyr-7b: 1200).",
    )
    skip_first: int | None = Field(
        None,
        ge=0,
        description="First tokens of each text to leave out of both terms: many models park a huge norm there. "
        "Default: 1 for a relative coefficient, 0 for a published one.",
    )
    min_cosine: float | None = Field(
        None,
        gt=-1,
        lt=1,
        description="A branch, not the joint control, stops early once the cosine of M_u and M_0 on forget tokens is below this.",
    )
    keep_activations: float = Field(
        0.5,
        ge=0,
        description="GiB on the model's device. Where a part's or the retain texts' activations fit in so much and each text comes "
        "about once or more, those that never change are kept for the next time, in other branches too. 0: none are.",
    )
    trainable: Trainable | None = Field(
        None, description="Default: the MLP output projections of blocks l-2, l-1 and l."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over each part's samples. Give this or steps.")
    steps: int | None = Field(80, ge=1, description="Optimizer steps for each part; the joint control takes their sum.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW (Zephyr-7b as published: 5e-5).")

    @model_validator(mode="before")
    @classmethod
    def _published_numbers(cls, values: Any) -> Any:
        """A preset stands in for what is not given; a length that is given replaces the preset's of either kind."""
        if not isinstance(values, dict) or str(values.get("preset")) not in PRESETS:
            return values
        given = set(values)
        if values.get("epochs") is not None or values.get("steps") is not None:
            given |= {"epochs", "steps"}
        if "max_length" in given:
            given.add("max_lengths")
        published = PRESETS[str(values["preset"])]
        return {**{key: value for key, value in published.items() if key not in given}, **values}


class RMU:
    """Steer the forget texts' hidden states to a fixed random direction; hold the retain texts' where they are."""

    Settings: ClassVar[type[TrainingSettings]] = RMUSettings
    source: ClassVar[str] = "Li et al. 2024, arXiv 2403.03218"
    needs_retain: ClassVar[bool] = True
    version: ClassVar[int] = 2

    @staticmethod
    def passes(settings: RMUSettings, depth: int) -> float:
        layer = block_index(TYPICAL_LAYER if settings.layer == "auto" else settings.layer, depth)
        # Forget and retain: the frozen prefix once, the trained blocks four times (base, forward, backward twice).
        return 2 * (max(0, layer - TRAINED_BLOCKS + 1) + 4 * min(TRAINED_BLOCKS, layer + 1)) / depth

    @staticmethod
    def last_block(settings: RMUSettings, depth: int) -> int | None:
        # What is trained by the recipe's own choice may lie anywhere.
        return block_index(settings.layer, depth) if settings.trainable is None else None

    @staticmethod
    def settle(base: Base, parts: Mapping[str, Samples], retain: Samples, settings: RMUSettings, seed: int) -> Settled:
        from spunge.unlearning.tuning import tune

        return tune(base, parts, retain, settings, seed)

    @staticmethod
    def unlearn(task: Task, settings: RMUSettings) -> Branch:
        base = task.base
        layer = block_index(settings.layer, base.depth)
        first = max(0, layer - TRAINED_BLOCKS + 1)
        if settings.trainable is not None:
            return _steer(task, settings, Trunk(base, 0, layer), training(base, settings.trainable, task.seed))
        names = _trained_names(base, first, layer)
        return _steer(task, settings, Trunk(base, first, layer, names), training_tensors(base, names))


@dataclass
class _Cosine:
    """Mean cosine on forget tokens over the last batches of a branch."""

    floor: float | None
    recent: list[float]

    def too_low(self) -> str | None:
        if self.floor is None or len(self.recent) < 4:
            return None
        mean = sum(self.recent[-4:]) / 4
        return f"cosine {mean:.3f} below {self.floor}" if mean < self.floor else None


def _steer(task: Task, settings: RMUSettings, trunk: Trunk, weights: Any) -> Branch:
    base = task.base
    if task.retain is None:
        raise RecipeError("retain: missing, and RMU needs it; add retain.source")
    order = interleaved(settings.steps_of({value: len(samples) for value, samples in task.parts.items()}))
    forget_batches = {value: part_stream(task, settings, value) for value in task.parts}
    retain_batches = retain_stream(task, settings, task.retain)
    size = base.model.config.get_text_config().hidden_size
    directions = {value: direction(size, seed).to(base.device) for value, seed in task.seeds.items()}
    cosine = _Cosine(settings.min_cosine if len(task.parts) == 1 else None, [])
    # The base's states on forget texts cost a tenth of a step: only where something is made of them.
    compared = isinstance(settings.coefficient, Relative) or cosine.floor is not None
    with weights as trained:
        originals = _block_weights(base, trunk, trained.originals)

        def base_states(entered: Entered) -> Tensor:
            with torch.no_grad(), trained.adapter_off():
                return trunk.states(entered, originals).float()

        def activations(stream: Stream, steps: int, asked: bool) -> Activations:
            draws, most = steps * settings.accumulation * stream.size, settings.keep_activations * 2**30
            return Activations(trunk, stream, base_states if asked else None, task.kept, draws, most)

        forget_states = {
            value: activations(stream, order.count(value), compared) for value, stream in forget_batches.items()
        }
        retain_states = activations(retain_batches, len(order), True)

        def forget_term(value: str) -> dict[str, float]:
            batch = next(forget_batches[value])
            kept = counted(batch, settings)
            entered, before = forget_states[value].of(batch)
            after = trunk.states(entered).float()
            goal = target(after.detach() if before is None else before, directions[value], settings)
            forget = token_mean(after - goal, kept)
            loop.backward(forget)
            if before is None:
                return {"forget": float(forget.detach())}
            cosine.recent.append(float(mean_cosine(after.detach(), before, kept)))
            return {"forget": float(forget.detach()), "cosine": cosine.recent[-1]}

        def next_loss(number: int) -> Loss:
            terms = forget_term(order[number // settings.accumulation])
            batch = next(retain_batches)
            kept = counted(batch, settings)
            entered, before = retain_states.of(batch)
            assert before is not None
            retain = token_mean(trunk.states(entered).float() - before, kept)
            damage = float(retain.detach()) / float(token_mean(before, kept))
            return Loss(terms["forget"] + settings.alpha * retain, {**terms, "retain": float(retain.detach())}, damage)

        streams = [*forget_batches.values(), retain_batches]
        parameters, memory = trained.parameters, {"cosine": cosine.recent}
        loop = Loop(task, settings, parameters, next_loss, len(order), streams, cosine.too_low, memory)
        history = loop.run()
        changes = trained.changes(1.0)
    return Branch(changes, history.steps, history.losses, history.stopped)


def block_index(layer: int | float | str, depth: int) -> int:
    """l as an index; a value below 1 that is no whole number is a share of the depth. Raises RecipeError outside it."""
    if isinstance(layer, str):
        raise RecipeError(
            f"unlearn.layer: {layer!r} is chosen once for a whole run, so `spunge.run` must do it; give a number"
        )
    index = round(layer * depth) if isinstance(layer, float) and 0 < layer < 1 else int(layer)
    if not 0 <= index < depth:
        raise RecipeError(f"unlearn.layer: {layer}: the model has {depth} blocks; give 0 to {depth - 1}")
    return index


def direction(size: int, seed: int) -> Tensor:
    """u: (d,), entries uniform on [0, 1), divided by the norm."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = drawn / drawn.norm()
    return unit


def target(before: Tensor, u: Tensor, settings: RMUSettings) -> Tensor:
    """c u for each token: (b, t, d), with c fixed or relative to the base's norm at that token."""
    if isinstance(settings.coefficient, Relative):
        length: Tensor = settings.coefficient.relative * before.norm(dim=-1, keepdim=True)
        return length * u
    if isinstance(settings.coefficient, str):
        raise RecipeError("unlearn.coefficient: 'auto' is chosen once for a whole run, so `spunge.run` must do it")
    return (settings.coefficient * u).expand_as(before)


def counted(batch: Batch, settings: RMUSettings) -> Tensor:
    """(b, t): 1 on the tokens that enter the loss, 0 on padding and on the first tokens that are left out."""
    skip = settings.skip_first
    if skip is None:
        skip = 1 if isinstance(settings.coefficient, Relative) else 0
    kept = batch.mask.clone()
    # A text too short to lose its first tokens keeps its last one.
    long_enough = batch.mask.sum(dim=1) > skip
    kept[long_enough, :skip] = 0
    return kept


def token_mean(difference: Tensor, kept: Tensor) -> Tensor:
    """Mean of the squares over the counted tokens and the hidden size: (b, t, d), (b, t) -> scalar."""
    squares = difference.square().mean(dim=-1) * kept
    mean: Tensor = squares.sum() / kept.sum()
    return mean


def mean_cosine(after: Tensor, before: Tensor, kept: Tensor) -> Tensor:
    """Mean cosine over the counted tokens: (b, t, d), (b, t, d), (b, t) -> scalar."""
    mean: Tensor = (torch.cosine_similarity(after, before, dim=-1) * kept).sum() / kept.sum()
    return mean


def _trained_names(base: Base, first: int, last: int) -> list[str]:
    names = {id(parameter): name for name, parameter in base.model.named_parameters()}
    blocks = find_blocks(base.model)
    return [
        names[id(weight)] for index in range(first, last + 1) for weight in down_projections(blocks[index]).values()
    ]


def _block_weights(base: Base, trunk: Trunk, originals: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """For each of the trunk's blocks, the base values of its trained tensors, by their names within the block."""
    names = {id(parameter): name for name, parameter in base.model.named_parameters()}
    return [
        {
            inner: originals[names[id(weight)]]
            for inner, weight in block.named_parameters()
            if names.get(id(weight)) in originals
        }
        for block in trunk.blocks
    ]
