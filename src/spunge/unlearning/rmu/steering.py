"""The steering itself: RMU's loss, and the training of a branch by it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Batch
from spunge.errors import RecipeError
from spunge.model.architecture import down_projections, find_blocks
from spunge.model.loading import Base
from spunge.unlearning.batches import Stream, interleaved, share
from spunge.unlearning.feed import part_stream, retain_stream
from spunge.unlearning.loop import Loop, Loss
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.rmu.kept import Activations
from spunge.unlearning.rmu.settings import TRAINED_BLOCKS, Relative, RMUSettings, block_index
from spunge.unlearning.rmu.trunk import Entered, Trunk
from spunge.unlearning.trained import training, training_tensors


def steer(task: Task, settings: RMUSettings) -> Branch:
    """Steer the forget texts' hidden states to a fixed random direction; hold the retain texts' where they are.

    Of several parts, in turn.
    """
    base = task.base
    layer = block_index(settings.layer, base.depth)
    first = max(0, layer - TRAINED_BLOCKS + 1)
    if settings.trainable is not None:
        trained = training(base, settings.trainable, task.seed, common=task.common)
        return _steer(task, settings, Trunk(base, 0, layer), trained)
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
            kept = steered(batch, settings)
            entered, before = forget_states[value].of(batch)
            after = trunk.states(entered).float()
            goal = target(after.detach() if before is None else before, directions[value], settings)
            forget = token_mean(after - goal, kept) * share(batch, lambda each: float(steered(each, settings).sum()))
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
            retain = retain * share(batch, lambda each: float(counted(each, settings).sum()))
            return Loss(terms["forget"] + settings.alpha * retain, {**terms, "retain": float(retain.detach())}, damage)

        streams = [*forget_batches.values(), retain_batches]
        parameters, memory = trained.parameters, {"cosine": cosine.recent}
        as_saved = partial(trained.as_saved, 1.0)
        loop = Loop(task, settings, parameters, next_loss, len(order), streams, cosine.too_low, memory, as_saved)
        history = loop.run()
        changes = trained.changes(1.0)
    return Branch(changes, history.steps, history.losses, history.stopped, history.notes, history.watched)


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
    return _without_first(batch, batch.mask.clone(), settings)


def steered(batch: Batch, settings: RMUSettings) -> Tensor:
    """(b, t): as `counted`, of forget texts. Where an answer follows a prompt, 1 on the answer's tokens and on the one before each,
    whose states tell them; of plain texts on all."""
    learned = batch.labels != IGNORED
    kept = learned | torch.nn.functional.pad(learned[:, 1:], (0, 1))
    places = torch.arange(kept.shape[1], device=kept.device)
    upto = places <= (kept * places).amax(dim=1, keepdim=True)
    plain = ~(upto & ~kept).any(dim=1, keepdim=True)  # nothing but what the tokenizer adds is context
    return _without_first(batch, torch.where(plain, batch.mask, kept.to(batch.mask.dtype)), settings)


def _without_first(batch: Batch, kept: Tensor, settings: RMUSettings) -> Tensor:
    skip = settings.skip_first
    if skip is None:
        skip = 1 if isinstance(settings.coefficient, Relative) else 0
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
