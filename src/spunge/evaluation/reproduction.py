"""How much of an answer a model reproduces by itself: from which of its tokens are the likeliest after all tokens before them."""

import numpy as np
import torch
from torch import Tensor


def likeliest(logits: Tensor, labels: Tensor) -> Tensor:  # (n, v), (n,) -> (n,), 1 where the token is the likeliest
    return (logits.argmax(dim=-1) == labels).to(torch.float64)


def exact_memorization(hits: np.ndarray) -> float:
    """Share of the tokens that are the likeliest. (n,) of bool."""
    return float(hits.mean()) if len(hits) else 0.0


def extraction_strength(hits: np.ndarray) -> float:
    """1 - k/n for the least k from which on every token is the likeliest. (n,) of bool.

    With no such token it is 0, as the formula says; open-unlearning's code gives 1/n there.
    """
    missed = np.flatnonzero(~hits)
    return 1 - (missed[-1] + 1) / len(hits) if len(missed) else float(len(hits) > 0)
