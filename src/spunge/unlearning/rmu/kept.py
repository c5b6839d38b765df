"""Activations that never change, kept for when their text comes again: in a later epoch, another branch, the joint control.

What the frozen blocks make of a text, and where the base's states end up, depends on neither the branch nor the step. They are
kept where a task draws each of the texts about once or more, and where they fit; elsewhere most would be used once.

A text's activations are always computed beside the same neighbours, whatever batch asks for them first. So the last bits of a
delta depend neither on which branches ran before it nor on where a killed one went on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from spunge.data.samples import Batch, Encoded, collate
from spunge.model.memory import halved
from spunge.unlearning.batches import Stream
from spunge.unlearning.method import Store
from spunge.unlearning.rmu.trunk import Entered, Trunk

GROUP = 8  # neighbours that are computed together


class Frozen(NamedTuple):
    """A batch on its way into the trained blocks."""

    entered: Entered
    base: Tensor | None  # (b, t, d) float32: the base's states after the last block, where they were asked for


class Activations:
    """What a stream's batches are in the frozen blocks and in the base.

    base_states: of a batch that has entered the trained blocks; None where nobody compares with the base.
    draws: texts that the task takes from the stream. most: bytes to keep of this stream's texts, at most.
    """

    def __init__(
        self,
        trunk: Trunk,
        stream: Stream,
        base_states: Callable[[Entered], Tensor] | None,
        store: Store | None,
        draws: int,
        most: float,
    ) -> None:
        self._trunk, self._stream, self._base_states = trunk, stream, base_states
        self._coded: list[Encoded] | None = None
        if store is None or draws < stream.count:
            return
        kinds = ([] if trunk.first == 0 else ["entering"]) + ([] if base_states is None else ["base"])
        config, dtype = stream.base.model.config.get_text_config(), stream.base.dtype
        self._coded = _fitting(stream, most / max(1, len(kinds)) / (config.hidden_size * dtype.itemsize))
        if self._coded is None:
            return
        what = (stream.samples.sha256, stream.lengths.longest, stream.packed, trunk.first, trunk.last)
        self._kept = {kind: store.setdefault((*what, kind), {}) for kind in kinds}

    def of(self, batch: Batch) -> Frozen:
        if self._coded is None:
            entered = self._trunk.prefix(batch)
            return Frozen(entered, None if self._base_states is None else self._base_states(entered))
        for row in batch.rows:
            if any(row not in kept for kept in self._kept.values()):
                self._compute(row - row % GROUP)
        states_of = {
            kind: _padded([kept[row] for row in batch.rows], batch.ids.shape[1]) for kind, kept in self._kept.items()
        }
        base = states_of["base"].float() if "base" in states_of else None
        return Frozen(self._trunk.prefix(batch, states_of.get("entering")), base)

    def _compute(self, first: int) -> None:
        """Everything of a row and its neighbours."""
        assert self._coded is not None
        rows = range(first, min(first + GROUP, len(self._coded)))
        lengths = [len(text.ids) for text in self._coded]
        for _ in halved([rows], lengths, self._compute_rows, "unlearn.max_length"):
            pass

    def _compute_rows(self, rows: Sequence[int]) -> None:
        assert self._coded is not None
        batch = collate([self._coded[row] for row in rows], self._stream.base.device)
        entered = self._trunk.prefix(batch)
        pieces = {"entering": entered.hidden}
        if self._base_states is not None:
            pieces["base"] = self._base_states(entered)
        for place, row in enumerate(rows):
            for kind, kept in self._kept.items():
                # A copy: a view would keep its neighbours' padding too.
                states = pieces[kind][place, : len(self._coded[row].ids)]
                kept[row] = states.to(self._stream.base.dtype, copy=True)


def _fitting(stream: Stream, most: float) -> list[Encoded] | None:
    """A stream's texts, encoded; None where they have more than so many tokens."""
    coded: list[Encoded] = []
    tokens = 0
    for start in range(0, stream.count, 64):
        coded += stream.encoded(range(start, min(start + 64, stream.count)))
        tokens += sum(len(text.ids) for text in coded[start:])
        if tokens > most:
            return None
    return coded


def _padded(states: list[Tensor], width: int) -> Tensor:  # of (t, d) -> (b, width, d)
    padded = states[0].new_zeros(len(states), width, states[0].shape[1])
    for row, each in enumerate(states):
        padded[row, : len(each)] = each
    return padded
