"""The calls of a model that make up a method's step: for plans, which follow them on shapes alone."""

import math
from collections.abc import Callable, Sized
from typing import Any, Literal, NamedTuple

Side = Literal["forget", "retain"]
SIDES: tuple[Side, Side] = ("forget", "retain")


class Call(NamedTuple):
    """One call of the model on a batch, and its loss."""

    of: Side = "forget"
    gradient: bool = True
    samples: int = 1  # rows for each row of the batch
    once: bool = False  # what it gives for a text is kept for the next time
    most: float = 0.0  # bytes of hidden states that may be kept so; 0: what it gives is next to nothing
    blocks: int | None = None  # so many blocks, without embeddings and output layer; None: the whole model
    beside: bool = (
        False  # a distribution over the vocabulary is compared at each place, in place of one token's likelihood
    )
    everywhere: bool = False  # at every place, whichever are learned


class Writing(NamedTuple):
    """Texts that the base writes before the first step, or the model on its way, a token at a time."""

    texts: int = 0
    tokens: int = 0  # of a text, at the most
    again: int = 0  # further calls for each token, which guide it
    read: int = 0  # tokens that such a call reads, on average
    at_once: int = 1  # texts


def learned_rows(samples: Sized, passes: float) -> int:
    """Of a part's samples those that are learned at least once in so many passes over them."""
    return math.ceil(len(samples) * min(1.0, passes))


Group = tuple[
    Call, ...
]  # calls whose losses are summed before a gradient is computed: what all of them hold is held together
Calls = Callable[[Any, int], list[Group]]  # (settings, the model's depth) -> the groups of a step, one after the other

FORGET, RETAIN = Call(), Call("retain")


def descending(settings: Any, forget: Group = (FORGET,), once: int = 0) -> list[Group]:
    """Of a method on outputs: its forget loss, then the retain term. once: calls of the base whose likelihoods are kept."""
    groups: list[Group] = [(Call(gradient=False, once=True),)] * once + [forget]
    if settings.alpha and settings.retain_loss == "kl":
        groups.append(
            (RETAIN._replace(gradient=False, once=settings.reference == "stored"), RETAIN._replace(beside=True))
        )
    elif settings.alpha:
        groups.append((RETAIN,))
    return groups


def beside_base(settings: Any, _depth: int) -> list[Group]:
    """Of a method on outputs whose forget loss sets the model's distributions beside the base's."""
    base = FORGET._replace(gradient=False, once=settings.reference == "stored")
    return descending(settings, (base, FORGET._replace(beside=True)))
