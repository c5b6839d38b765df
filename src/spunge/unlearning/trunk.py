"""The first blocks of a model, run in two pieces: the frozen prefix once, then the trained blocks as often as needed.

RMU needs the hidden states after block l of the model being unlearned and of the base. Blocks below the first trained
one are the same in both, so their output is computed once per batch, without gradient; the forward pass stops at
block l; the base's states come from the same blocks with their original weights put back for that call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spunge.models import Base, find_blocks
from spunge.texts import Batch


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside the model's forward when the last needed block has been reached."""


@dataclass(frozen=True)
class Entered:
    """How the model called the trained blocks: the hidden states that enter the first, each block's other arguments."""

    hidden: Tensor  # (b, t, d)
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class Trunk:
    """Blocks 0..last of a model; blocks from `first` on are trained, those below are frozen."""

    def __init__(self, base: Base, first: int, last: int) -> None:
        self._model = base.model
        self.blocks = list(find_blocks(base.model))[first : last + 1]
        self._gives_tuple: list[bool] | None = None

    def prefix(self, batch: Batch) -> Entered:
        """Run the frozen blocks. The trained ones are entered but not run."""
        if self._gives_tuple is None:
            self._gives_tuple = self._observe_outputs(batch)
        gives_tuple = self._gives_tuple
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entered: list[Tensor] = []

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
        try:
            with torch.no_grad():
                self._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        except _Stop:
            pass
        finally:
            for block in self.blocks:
                del block.forward
        return Entered(entered[0], arguments)

    def states(self, entered: Entered, weights: Sequence[Mapping[str, Tensor]] | None = None) -> Tensor:
        """Hidden states (b, t, d) after the last block, with each block's own weights or with those given instead."""
        hidden = entered.hidden
        for position, (block, (args, kwargs)) in enumerate(zip(self.blocks, entered.arguments, strict=True)):
            if weights is None:
                out = block(hidden, *args, **kwargs)
            else:
                out = torch.func.functional_call(block, dict(weights[position]), (hidden, *args), kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _observe_outputs(self, batch: Batch) -> list[bool]:
        """Whether each block gives its hidden states in a tuple: older architectures do, newer ones do not."""
        gives: list[bool] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            gives.append(isinstance(output, tuple))
            if len(gives) == len(self.blocks):
                raise _Stop

        hooks = [block.register_forward_hook(note) for block in self.blocks]
        try:
            with torch.no_grad():
                self._model(input_ids=batch.ids[:1], attention_mask=batch.mask[:1], use_cache=False)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return gives
