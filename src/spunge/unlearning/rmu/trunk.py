"""The first blocks of a model, run in two pieces: the frozen prefix once, then the trained blocks as often as needed.

RMU needs the hidden states after block l of the model being unlearned and of the base. Blocks below the first trained
one are the same in both, so their output is computed once per batch, without gradient; the forward pass stops at
block l; the base's states come from the same blocks with their original weights put back for that call. In the first
trained block the attention and the MLP up to its output projection are the same in both, and are run once too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spunge.data.samples import Batch
from spunge.errors import RecipeError
from spunge.model.architecture import find_blocks
from spunge.model.loading import Base
from spunge.unlearning.trained import evaluation_mode


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside the model's forward when the last needed block has been reached."""


@dataclass(frozen=True)
class Entered:
    """How the model called the trained blocks: the hidden states that enter the first, each block's other arguments."""

    hidden: Tensor  # (b, t, d)
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    # What the first trained block's untrained front gave in the first call of `states`: module -> its outputs.
    front: dict[nn.Module, list[Any]] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)  # of the tensors among them, which rise when one is written into


class Trunk:
    """Blocks 0..last of a model; blocks from `first` on are trained, those below are frozen.

    trained: names of the tensors that change, where nothing else does. What comes before them in block `first` is then
    run once for each batch.
    """

    def __init__(self, base: Base, first: int, last: int, trained: Collection[str] = ()) -> None:
        self._model = base.model
        self._device = base.device  # where batches are, and states are compared; a block may be on another
        self._recomputed = base.checkpoint_activations
        self.first, self.last = first, last
        blocks = list(find_blocks(base.model))
        self._frozen, self.blocks = blocks[:first], blocks[first : last + 1]
        parameters = dict(base.model.named_parameters())
        changing = {id(parameters[name]) for name in trained}
        self._owners = {
            module
            for module in self.blocks[0].modules()
            if any(id(weight) in changing for weight in module.parameters(recurse=False))
        }
        self._front: list[nn.Module] = []
        self._gives_tuple: list[bool] | None = None

    def prefix(self, batch: Batch, entering: Tensor | None = None) -> Entered:
        """Run the frozen blocks. The trained ones are entered but not run.

        entering: what the frozen blocks gave for this batch (b, t, d), where that is known; they are not run then.
        """
        if self._gives_tuple is None:
            self._gives_tuple, inside = self._observe_outputs(batch)
            self._require_chain(batch, inside)
        gives_tuple = self._gives_tuple
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entered: list[Tensor] = []

        def known(*args: Any, **kwargs: Any) -> Any:
            return (entering,) if gives_tuple[0] else entering

        def stand_in(position: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rest = dict(kwargs)
                hidden = rest.pop("hidden_states") if not args else args[0]
                entered.append(hidden)
                arguments.append((args[1:], rest))
                if position == len(self.blocks) - 1:
                    raise _Stop
                return (hidden,) if gives_tuple[position] else hidden

            return forward

        for position, block in enumerate(self.blocks):
            block.forward = stand_in(position)
        stood_in = [*self.blocks, *(self._frozen if entering is not None else ())]
        for block in stood_in[len(self.blocks) :]:
            block.forward = known
        try:
            with torch.no_grad():
                self._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        except _Stop:
            pass
        finally:
            for block in stood_in:
                del block.forward
        return Entered(entered[0], arguments)

    def states(self, entered: Entered, weights: Sequence[Mapping[str, Tensor]] | None = None) -> Tensor:
        """Hidden states (b, t, d) after the last block, with each block's own weights or with those given instead."""
        hidden = entered.hidden
        for position, (block, (args, kwargs)) in enumerate(zip(self.blocks, entered.arguments, strict=True)):
            with self._front_once(entered) if position == 0 else nullcontext():
                if weights is None and self._holds_nothing(position):
                    out = checkpoint(block, hidden, *args, use_reentrant=False, **kwargs)
                elif weights is None:
                    out = block(hidden, *args, **kwargs)
                else:
                    out = torch.func.functional_call(block, dict(weights[position]), (hidden, *args), kwargs)
            hidden = _hidden(out)
        return hidden.to(self._device)

    def _holds_nothing(self, position: int) -> bool:
        """Whether a block is computed again in the backward pass. Not the first where its front is replayed: that is gone by then,
        and what comes after it is little."""
        return self._recomputed and torch.is_grad_enabled() and (position > 0 or not self._front)

    def _require_chain(self, batch: Batch, inside: Tensor) -> None:
        """Raises RecipeError where the blocks, run one by one on the first text, do not give what they give inside the model: where
        a block is told more than its arguments hold, or changes them."""
        row = batch._replace(ids=batch.ids[:1], mask=batch.mask[:1], rows=())
        there = row.mask.bool()
        try:
            with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(self._model):
                alone = self.states(self.prefix(row))
            if alone.shape != (*row.ids.shape, alone.shape[-1]):
                raise ValueError(f"hidden states of the shape {list(alone.shape)}")
            apart = float((alone - inside)[there].norm() / inside[there].norm())
            reason = "" if apart < 0.02 else f"they differ by {apart:.0%}"
        except Exception as error:  # whatever an architecture's own code objects to
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        if reason:
            raise RecipeError(
                f"unlearn.method: rmu runs a model's blocks one by one, and those of {type(self._model).__name__} do not give the "
                f"same so ({reason}); take another method, such as npo or tvn"
            )

    @contextmanager
    def _front_once(self, entered: Entered) -> Iterator[None]:
        """Inside the block, the front's modules run and are noted; the next time they give what was noted."""
        if entered.front and entered.versions == _versions(entered.front):
            for module, outputs in entered.front.items():
                module.forward = _replay(outputs)
            try:
                yield
            finally:
                for module in entered.front:
                    del module.forward
            return
        entered.front.clear()
        hooks = [
            module.register_forward_hook(
                lambda module, _inputs, output: entered.front.setdefault(module, []).append(output)
            )
            for module in self._front
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        entered.versions[:] = _versions(entered.front)

    def _observe_outputs(self, batch: Batch) -> tuple[list[bool], Tensor]:
        """Whether each block gives its hidden states in a tuple: older architectures do, newer ones do not; and the last one's for
        the first text, without dropout.

        Also finds the first block's front: the modules that have run when the first trained one begins.
        """
        gives: list[bool] = []
        hidden: list[Tensor] = []
        ran: list[nn.Module] = []
        begun: list[nn.Module] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            gives.append(not isinstance(output, Tensor))
            hidden.append(_hidden(output))
            if len(gives) == len(self.blocks):
                raise _Stop

        def note_front(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if not begun:
                ran.append(module)

        hooks = [block.register_forward_hook(note) for block in self.blocks]
        hooks += [module.register_forward_hook(note_front) for module in self.blocks[0].modules()]
        hooks += [
            owner.register_forward_pre_hook(lambda module, _inputs: begun.append(module)) for owner in self._owners
        ]
        try:
            # A resumed branch must find its random numbers as they were.
            with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(self._model):
                self._model(input_ids=batch.ids[:1], attention_mask=batch.mask[:1], use_cache=False)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        inner = {below for module in ran for below in module.modules() if below is not module}
        self._front = [module for module in ran if module not in inner] if begun else []
        if len(gives) < len(self.blocks):
            raise RecipeError(
                f"unlearn.method: rmu steers blocks that {type(self._model).__name__} does not run on text; take another method"
            )
        return gives, hidden[-1].to(self._device)


def _hidden(output: Any) -> Tensor:
    """A block's hidden states: what it gives, or the first of several."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _replay(outputs: list[Any]) -> Any:
    rest = iter(outputs)
    return lambda *args, **kwargs: next(rest)


def _versions(front: Mapping[nn.Module, list[Any]]) -> list[int]:
    """How often each noted tensor has been written into."""
    flat = [
        each for outputs in front.values() for out in outputs for each in (out if isinstance(out, tuple) else (out,))
    ]
    return [each._version for each in flat if isinstance(each, Tensor)]
