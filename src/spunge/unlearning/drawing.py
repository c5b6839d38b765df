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

Scores = Callable[[Tensor, Tensor], Tensor]  # tokens so far (1, t), logits (1, v) -> scores (1, v), float32


def drawn(
    base: Base,
    ids: list[int],
    most: int,
    seeds: Sequence[int] | None,
    scored: Scores,
    ends: int | list[int] | None = None,
) -> list[int]:
    """The tokens with those that are written after them, at most `most`: each the greatest of scores and Gumbel noise, that is, a
    draw by their softmax. seeds: of the noise, beside the tokens; None leaves it out. ends: tokens that end it."""
    from transformers import LogitsProcessorList

    noise = None if seeds is None else np.random.default_rng([*seeds, zlib.crc32(str(ids).encode())])

    def noisy(given: Tensor, logits: Tensor) -> Tensor:
        scores = scored(given, logits)
        if noise is None:
            return scores
        return scores + torch.from_numpy(noise.gumbel(size=logits.shape)).to(logits.device, torch.float32)

    asked = torch.tensor([ids], device=base.device)
    with torch.no_grad(), evaluation_mode(base.model), base.autocast(), greedily(base.model, base.tokenizer):
        out: Any = base.model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=most,
            eos_token_id=ends,
            logits_processor=LogitsProcessorList([noisy]),
        )
    tokens: list[int] = out[0].tolist()
    return tokens
