"""The places of a batch whose next token is learned or scored, and the losses there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Batch, token_losses


class Scored(NamedTuple):
    """n scored tokens of b samples. Prompts and padding are not among them, so no loss can count them."""

    logits: Tensor  # (n, v) float32, that predict the tokens
    labels: Tensor  # (n,)
    rows: Tensor  # (n,) which sample of the batch each belongs to
    samples: int  # b

    def losses(self) -> Tensor:
        """(n,): the negative log-likelihood of each token, NLL below."""
        return token_losses(self.logits, self.labels)

    def mean(self) -> Tensor:
        """Scalar: the mean NLL of the tokens."""
        return self.losses().sum() / max(1, self.labels.numel())

    def sums(self) -> Tensor:
        """(b,): each sample's summed NLL."""
        return self.per_sample(self.losses())

    def lengths(self) -> Tensor:
        """(b,): each sample's number of scored tokens, at least 1."""
        return self.per_sample(torch.ones_like(self.logits[:, 0])).clamp(min=1)

    def per_sample(self, values: Tensor) -> Tensor:
        """(n,) -> (b,): sums over each sample's tokens."""
        return torch.zeros(self.samples, dtype=values.dtype, device=values.device).index_add(0, self.rows, values)


def outputs(model: Any, batch: Batch) -> Scored:
    """A model's outputs at the scored places of a batch."""
    return scored(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)


def scored(logits: Tensor, batch: Batch) -> Scored:
    """Pick the scored places out of logits (b, t, v)."""
    wanted = batch.labels[:, 1:] != IGNORED
    rows = wanted.nonzero()[:, 0]
    return Scored(logits[:, :-1][wanted].float(), batch.labels[:, 1:][wanted], rows, batch.labels.shape[0])
