"""Log-likelihoods of many texts under one model: batched by length, with logits computed only where a token is scored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spunge.data.samples import IGNORED, Encoded, collate, token_losses
from spunge.model.board import batched
from spunge.model.loading import Base
from spunge.model.padding import grouped
from spunge.model.reading import reading_of
from spunge.progress import Steps

TOKENS_PER_BATCH = 4096
LOGITS_BYTES = 1 << 30  # of one batch: each takes its own dtype, float32, and a copy inside the loss


class Likelihood(NamedTuple):
    log: float  # sum of the scored tokens' natural log-probabilities
    tokens: int


def likelihoods(
    base: Base, texts: Sequence[Encoded], progress: Steps, tokens_per_batch: int | None = None
) -> list[Likelihood]:
    """For each text, the log-likelihood of its labelled tokens given those before them; see `token_logs`."""
    logs = token_logs(base, texts, progress, tokens_per_batch)
    return [Likelihood(float(each.sum()), len(each)) for each in logs]


def token_logs(
    base: Base, texts: Sequence[Encoded], progress: Steps, tokens_per_batch: int | None = None
) -> list[Tensor]:
    """For each text, the natural log-probabilities of its labelled tokens given those before them: (n,) float64, on the CPU.

    A first token has no context and is never scored.
    """
    return token_values(base, texts, _logs, progress, tokens_per_batch)


def _logs(logits: Tensor, labels: Tensor) -> Tensor:
    return -token_losses(logits, labels)


def token_values(
    base: Base,
    texts: Sequence[Encoded],
    values: Callable[[Tensor, Tensor], Tensor],
    progress: Steps,
    tokens_per_batch: int | None = None,
) -> list[Tensor]:
    """For each text, what `values` says of its labelled tokens: (n,) or (n, c) float64, on the CPU.

    values: logits (n, v) and the tokens (n,) that they predict -> (n,) or (n, c). A first token is never among them. Where it is a
    function of a module, other processes may take part (`model.board`).
    """
    reading_of(base)  # refuses a model that sees what it predicts
    sizes = [len(text.ids) for text in texts]
    told: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(texts)
    finished = 0

    groups = grouped(sizes, tokens_per_batch or batch_tokens(base))
    probed = max((text.ids for text in texts), key=len, default=[])
    for rows, pieces in batched(base, groups, sizes, _scored, (texts, values), probed, "evaluate"):
        for row, piece in zip(rows, pieces, strict=True):
            told[row] = piece
        finished += len(rows)
        progress(finished, len(texts))
    return told


Values = Callable[[Tensor, Tensor], Tensor]


def _scored(base: Base, given: tuple[Sequence[Encoded], Values], rows: Sequence[int]) -> Sequence[Tensor]:
    """What the values are of each of a batch's texts."""
    texts, values = given
    batch = collate([texts[row] for row in rows], base.device)
    labels = batch.labels[:, 1:]
    wanted = torch.nn.functional.pad(labels != IGNORED, (0, 1))  # a position's logits are for the next token
    with torch.inference_mode(), head_at(base, wanted):
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        each = values(logits.view(-1, logits.shape[-1]), labels[labels != IGNORED])
    return torch.split(each.double().cpu(), wanted.sum(dim=1).tolist())


@contextmanager
def head_at(base: Base, wanted: Tensor) -> Iterator[None]:
    """Inside the block, the model's output layer sees only the positions in `wanted` (b, t): logits are (1, n, v).

    At a vocabulary of 50,000 and more the logits of every position would be most of the memory and much of the time. Where every
    place is needed, the logits themselves are cut to those.
    """

    def keep(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][wanted.to(inputs[0].device)].unsqueeze(0), *inputs[1:])

    def cut(_model: Any, _inputs: tuple[Any, ...], output: Any) -> Any:
        output.logits = output.logits[wanted.to(output.logits.device)].unsqueeze(0)
        return output

    if base.every_place:
        hooks = [base.model.register_forward_hook(cut)]  # after the one that shifts them
    else:
        hooks = [head.register_forward_pre_hook(keep) for head in base.heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batch_tokens(base: Base) -> int:
    """Tokens of a batch, such that the logits stay within their share of memory."""
    vocabulary: int = base.model.config.get_text_config().vocab_size
    return max(256, min(TOKENS_PER_BATCH, LOGITS_BYTES // (10 * vocabulary)))
