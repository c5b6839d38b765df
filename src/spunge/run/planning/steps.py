"""A training's steps as a plan sees them: which calls on which texts, how many, and what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from spunge.data.samples import IGNORED, Samples
from spunge.recipe.training import Everything, LoRA, Optimizer, Selected
from spunge.unlearning.batches import encoded
from spunge.unlearning.calls import Group, Side
from spunge.unlearning.forms import FORMS
from spunge.unlearning.scored import cut_by_length

LOOKED_AT = 128  # rows whose lengths stand for all
DRAWN = 32  # batches of them


@dataclass(frozen=True)
class Rows:
    """What batches are drawn from."""

    samples: Sequence[Samples]
    lengths: Sequence[int]  # max_length of each
    batch: int
    packed: bool = False

    @property
    def count(self) -> int:
        return sum(map(len, self.samples))


@dataclass(frozen=True)
class Steps:
    """A training."""

    count: int  # optimizer steps
    accumulation: int
    groups: Sequence[Group]
    what: LoRA | Selected | Everything | None  # None: the output projections of the blocks that are called
    optimizer: Optimizer
    rows: Mapping[Side, Rows]
    keeps_good: bool  # the last good weights beside those in training
    keeps_best: bool  # and those of the best step
    further: int = 0  # float32 copies of what is trained, beside weights and gradients
    blocks: int | None = None  # of the model in memory, without an output layer; None: all of it


def shared_out(steps: Steps, parts: int) -> Steps:
    """The same of the largest of so many parts of each batch."""
    return replace(
        steps, rows={side: replace(each, batch=-(-each.batch // parts)) for side, each in steps.rows.items()}
    )


class Fed(NamedTuple):
    """Batches of some rows, as calls are given them: padded to groups of about one length."""

    rows: int  # of a batch
    tokens: int  # of each row of the largest batch, padded
    scored: int  # of these, those whose loss is looked at
    share: float  # a batch's tokens on average, of the largest one's
    texts: int  # all rows
    mean: float  # tokens of a text


def fed(rows: Rows, tokenizer: Any, positions: int | None, gpu: bool) -> Fed:
    """Some of the rows are encoded, and batches drawn of them."""
    coded = [
        pair
        for samples, most in zip(rows.samples, rows.lengths, strict=True)
        for pair in _lengths(samples, most, tokenizer)
    ]
    most = max(rows.lengths)
    if positions is not None:
        most = min(most, positions)
        coded = [(min(tokens, most), min(learned, most)) for tokens, learned in coded]
    mean = sum(tokens for tokens, _ in coded) / max(1, len(coded))
    if rows.packed:
        return Fed(rows.batch, most, most - 1, 1.0, max(1, round(rows.count * mean / most)), most)
    if not coded:
        return Fed(rows.batch, most, most - 1, 1.0, 0, most)
    drawn = np.random.default_rng(0).integers(0, len(coded), (DRAWN, rows.batch))
    each = FORMS["cuda" if gpu else "cpu"].call
    padded, scored = [], []
    for places in drawn:
        tokens = [coded[place][0] for place in places]
        groups = cut_by_length(tokens, each)
        padded.append(sum(len(group) * max(tokens[row] for row in group) for group in groups))
        scored.append(sum(coded[place][1] for place in places))
    largest = max(padded)
    return Fed(
        rows.batch,
        -(-largest // rows.batch),
        max(1, round(max(scored) / rows.batch)),
        sum(padded) / len(padded) / largest,
        rows.count,
        mean,
    )


def _lengths(samples: Samples, most: int, tokenizer: Any) -> list[tuple[int, int]]:
    """Tokens, and those that are learned, of rows spread over all; as many as there may be where no tokenizer tells."""
    if not len(samples):
        return []
    if tokenizer is None:
        return [(most, most - 1)]
    places = np.linspace(0, len(samples) - 1, min(LOOKED_AT, len(samples))).round().astype(int).tolist()
    return [
        (len(each.ids), sum(label != IGNORED for label in each.labels[1:]))
        for each in encoded(samples, places, tokenizer, most)
    ]
