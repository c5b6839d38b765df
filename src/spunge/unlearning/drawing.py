"""What a model writes after some tokens, drawn with noise that the tokens decide: the same wherever and whenever it is asked."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spunge.model.loading import Base
from spunge.unlearning.forgotten import greedily
from spunge.unlearning.trained import evaluation_mode

Scores = Callable[[Tensor, Tensor], Tensor]  # tokens so far (n, t), logits (n, v) -> scores (n, v), float32


def drawn(
    base: Base,
    ids: list[int],
    most: int,
    seeds: Sequence[Sequence[int] | None],
    scored: Scores,
    ends: int | list[int] | None = None,
) -> list[list[int]]:
    """The tokens with those that are written after them, at most `most`: each the greatest of scores and Gumbel noise, that is, a
    draw by their softmax. seeds: of each draw's noise, beside the tokens; None leaves it out. ends: tokens that end it; what stands
    behind one is padding."""
    from transformers import LogitsProcessorList

    told = zlib.crc32(str(ids).encode())
    noises = [None if each is None else np.random.default_rng([*each, told]) for each in seeds]

    def noisy(given: Tensor, logits: Tensor) -> Tensor:
        scores, width = scored(given, logits), logits.shape[1]
        added = np.stack([np.zeros(width) if noise is None else noise.gumbel(size=width) for noise in noises])
        return scores + torch.from_numpy(added).to(logits.device, torch.float32)

    asked = torch.tensor([ids] * len(noises), device=base.device)
    with torch.no_grad(), evaluation_mode(base.model), base.autocast(), greedily(base.model, base.tokenizer):
        out: Any = base.model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=most,
            eos_token_id=ends,
            logits_processor=LogitsProcessorList([noisy]),
        )
    tokens: list[list[int]] = out.tolist()
    return tokens
