"""The places of a batch whose next token is learned or scored, and the losses there.

At vocabularies of 50,000 and more the logits of a whole batch would be most of a training step's memory. They are never held:
what the output layer reads is kept, and logits, losses and gradients are computed for some places after the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from spunge.data.samples import Batch, sent, token_losses
from spunge.unlearning.forms import Forms, forms_of
from spunge.unlearning.head import Head, head_of, reading

TRAINED = 8  # times as much where the output layer is trained: each piece adds to a gradient of the layer's own size

# Of some places: (k, v) log-probabilities of another model there.
LogProbabilities = Callable[[slice], Tensor]


@dataclass(frozen=True)
class Scored:
    """n scored tokens of b samples. Prompts and padding are not among them, so no loss can count them."""

    states: Tensor  # (n, h) that the output layer reads; or the logits themselves, (n, v)
    labels: Tensor  # (n,)
    rows: Tensor  # (n,) which sample of the batch each belongs to
    samples: int  # b
    logits_of: Callable[[Tensor], Tensor]  # states of k places -> their logits (k, v), float32
    piece: int  # places whose logits are computed at once
    trains_head: bool = False  # a gradient reaches the output layer's own parameters

    def losses(self) -> Tensor:
        """(n,): the negative log-likelihood of each token, NLL below."""
        return self.each(lambda logits, places: token_losses(logits, self.labels[places]))

    def mean(self) -> Tensor:
        """Scalar: the mean NLL of the tokens."""
        return self.mean_of(self.losses())

    def sums(self) -> Tensor:
        """(b,): each sample's summed NLL."""
        return self.per_sample(self.losses())

    def lengths(self) -> Tensor:
        """(b,): each sample's number of scored tokens, at least 1."""
        return self.per_sample(torch.ones_like(self.labels, dtype=torch.float32)).clamp(min=1)

    def divergences(self, base: LogProbabilities) -> Tensor:
        """(n,): KL(base || this model) at each place."""

        def divergence(logits: Tensor, places: slice) -> Tensor:
            return kl_div(logits.log_softmax(-1), base(places), log_target=True, reduction="none").sum(-1)

        return self.each(divergence)

    def log_probabilities(self, places: slice) -> Tensor:
        """(k, v) float32, of some places."""
        return self.logits_of(self.states[places]).log_softmax(-1)

    def mean_of(self, values: Tensor) -> Tensor:
        """(n,) -> scalar; 0 where nothing is scored."""
        return values.sum() / max(1, self.labels.numel())

    def per_sample(self, values: Tensor) -> Tensor:
        """(n,) -> (b,): sums over each sample's tokens."""
        return torch.zeros(self.samples, dtype=values.dtype, device=values.device).index_add(0, self.rows, values)

    def sample_mean(self, values: Tensor) -> Tensor:
        """(n,) -> scalar: the mean over samples of the mean over their tokens."""
        return (self.per_sample(values) / self.lengths()).mean()

    def places(self) -> list[slice]:
        """All places, as many at once as `piece` says; at least one slice."""
        count = self.labels.numel()
        return [slice(start, min(start + self.piece, count)) for start in range(0, max(1, count), self.piece)]

    def each(self, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """(n,): a loss of each place, given the logits (k, v) of some and which they are; it may look at no other place's logits.

        What is held for the gradient is of the size of `states`.
        """

        def of(states: Tensor, places: slice) -> Tensor:
            return loss(self.logits_of(states), places)

        pieces = self.places()
        learned = torch.is_grad_enabled() and (self.states.requires_grad or self.trains_head)
        if len(pieces) == 1 or not learned:
            return torch.cat([of(self.states[places], places) for places in pieces])
        if self.trains_head:
            return torch.cat([checkpoint(of, self.states[places], places, use_reentrant=False) for places in pieces])
        return _EachPlace.apply(self.states, of, pieces)  # type: ignore[no-untyped-call, no-any-return]


class _EachPlace(torch.autograd.Function):
    """Losses of all places, piece after piece. As a place's loss depends on its own states alone, its gradient is known once the
    loss is, up to the factor that the backward pass brings: no logits are kept, and none are computed twice."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, of: Callable[[Tensor, slice], Tensor], pieces: list[slice]) -> Tensor:
        gradients, losses = torch.empty_like(states), []
        for places in pieces:
            with torch.enable_grad():
                own = states[places].detach().requires_grad_(True)
                each = of(own, places)
                (gradients[places],) = torch.autograd.grad(each.sum(), own)
            losses.append(each.detach())
        ctx.save_for_backward(gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (factors[:, None] * gradients).to(gradients.dtype), None, None


def outputs(
    model: Any,
    batch: Batch,
    call: Callable[..., Any] | None = None,
    values: Callable[[], Mapping[str, Tensor]] = dict,
    in_one: bool = False,
) -> Scored:
    """A model's outputs at the scored places of a batch.

    call: another way to call the model; values: asked for after the call, what it took in place of the output layer's own
    parameters. in_one: the model is called once with all rows, for who reads or changes what its blocks give.
    """
    call, head = call or model, head_of(model, batch)
    if head is None:
        return scored(call(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)
    groups = [list(range(len(batch.mask)))] if in_one else rows_alike(batch)
    known, device, spots = batch.counted, batch.ids.device, _spots(batch)
    if len(groups) == 1:
        with reading(head.layer, spots.at, batch.ids.shape) as read:
            call(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        return _behind(head, read[0], spots, len(batch.ids), values())
    read, numbered, given = [], np.arange(known.wanted.size).reshape(known.wanted.shape), []
    for rows in groups:
        length = max(known.reach[row] for row in rows)
        wanted = known.wanted[rows, :length]
        own, ids, mask = sent(np.array(rows), device), batch.ids[:, :length], batch.mask[:, :length]
        given.append(numbered[rows, :length][wanted])
        with reading(head.layer, sent(np.flatnonzero(wanted), device), wanted.shape) as states:
            call(input_ids=ids.index_select(0, own), attention_mask=mask.index_select(0, own), use_cache=False)
        read += states
    order = sent(np.concatenate(given).argsort(), device)
    return _behind(head, torch.cat(read).index_select(0, order), spots, len(batch.ids), values())


class _Spots(NamedTuple):
    """The scored places of a batch, row after row."""

    at: Tensor  # (n,) row * t + column
    labels: Tensor  # (n,) the token that follows
    rows: Tensor  # (n,)


def _spots(batch: Batch) -> _Spots:
    wanted = batch.counted.wanted
    at = np.flatnonzero(wanted)
    places, rows = sent(np.stack([at, at // wanted.shape[1]]), batch.ids.device)
    return _Spots(places, batch.labels.flatten().index_select(0, places + 1), rows)


def rows_alike(batch: Batch) -> list[list[int]]:
    """The rows of a batch in groups of about one length, which the model is called with one by one: what is computed for padding
    costs as much as what is computed for text, but so does every call.

    Of all ways to cut the rows by their lengths it is the cheapest; one group where cutting saves less than it costs.
    """
    count = len(batch.mask)
    # Processes that share a model must call it as often as one another.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [list(range(count))]
    groups = cut_by_length(batch.counted.reach, forms_of(batch.ids.device).call)
    return groups if len(groups) > 1 else [list(range(count))]


def cut_by_length(lengths: Sequence[int], each: int) -> list[list[int]]:
    """Rows of these lengths in groups, the longest first. each: tokens that a call costs beside those that it computes.

    >>> cut_by_length([10, 300, 11, 290], each=64)
    [[1, 3], [2, 0]]
    >>> cut_by_length([10, 300, 11, 290], each=4096)
    [[1, 3, 2, 0]]
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    sizes = [lengths[row] for row in rows]
    best: list[tuple[int, list[int]]] = [(0, [])]  # of the longest rows: the cost, and where the groups begin
    for end in range(1, len(rows) + 1):
        ways = [(best[start][0] + (end - start) * sizes[start] + each, start) for start in range(end)]
        cost, start = min(ways)
        best.append((cost, [*best[start][1], start]))
    starts = best[-1][1]
    return [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def scored(logits: Tensor, batch: Batch) -> Scored:
    """Pick the scored places out of logits (b, t, v). Raises IndexError where they are of other places than the batch."""
    if logits.shape[:2] != batch.labels.shape:
        raise IndexError(f"logits {tuple(logits.shape)} of {tuple(batch.labels.shape)} places")
    spots = _spots(batch)
    chosen = logits.flatten(0, 1).index_select(0, spots.at.to(logits.device)).float()
    return Scored(chosen, spots.labels, spots.rows, batch.labels.shape[0], Tensor.float, max(1, len(spots.labels)))


def places_at_once(forms: Forms, vocabulary: int, width: int, trained: bool) -> int:
    """Of how many places the logits are computed at once. trained: the output layer is; then pieces are computed twice."""
    nbytes, least = (TRAINED * forms.piece, forms.widths * width) if trained else (forms.piece, 1)
    return max(1, least, nbytes // (4 * vocabulary))


def _behind(head: Head, states: Tensor, spots: _Spots, samples: int, values: Mapping[str, Tensor]) -> Scored:
    """The outputs whose states (n, h) were read. values: of the output layer's parameters, where they are not its own."""
    parameters = list(head.layer.parameters())
    trained = not values and any(parameter.requires_grad for parameter in parameters)

    def logits_of(states: Tensor) -> Tensor:
        if values:
            return head.after(torch.func.functional_call(head.layer, dict(values), (states,))).float()
        return head.after(head.layer(states)).float()

    piece = places_at_once(forms_of(states.device), head.vocabulary, states.shape[-1], trained)
    return Scored(states, spots.labels, spots.rows, samples, logits_of, piece, trained)
