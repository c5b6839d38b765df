"""What a model writes after prompts, drawn with noise that a prompt's tokens decide: the same wherever and whenever it is asked."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spunge.model.loading import Base
from spunge.model.padding import left_padded
from spunge.unlearning.forgotten import greedily
from spunge.unlearning.trained import evaluation_mode

Scores = Callable[[Tensor, Tensor], Tensor]  # tokens written so far (n, t), logits (n, v) -> scores (n, v), float32


def drawn(
    base: Base,
    prompts: Sequence[list[int]],
    most: int,
    seeds: Sequence[Sequence[int] | None],
    scored: Scores,
    ends: int | list[int] | None = None,
) -> list[list[int]]:
    """The tokens that are written after each of the prompts, at most `most`: each the greatest of scores and Gumbel noise, that is,
    a draw by their softmax. seeds: of each draw's noise, beside the prompt's tokens; None leaves it out. ends: tokens that end it;
    what stands behind one is padding. Prompts of unequal length need a model that padding on their left does not change
    (`spunge.model.reading`)."""
    from transformers import LogitsProcessorList

    noises = [
        None if seed is None else np.random.default_rng([*seed, zlib.crc32(str(ids).encode())])
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    pad = base.tokenizer.pad_token_id
    asked, mask = (each.to(base.device) for each in left_padded(prompts, 0 if pad is None else pad))

    def noisy(given: Tensor, logits: Tensor) -> Tensor:
        scores, width = scored(given[:, asked.shape[1] :], logits), logits.shape[1]
        added = np.stack([np.zeros(width) if noise is None else noise.gumbel(size=width) for noise in noises])
        return scores + torch.from_numpy(added).to(logits.device, torch.float32)

    with torch.no_grad(), evaluation_mode(base.model), base.autocast(), greedily(base.model, base.tokenizer):
        out: Any = base.model.generate(
            input_ids=asked,
            attention_mask=mask,
            max_new_tokens=most,
            eos_token_id=ends,
            logits_processor=LogitsProcessorList([noisy]),
        )
    tokens: list[list[int]] = out[:, asked.shape[1] :].tolist()
    return tokens
