"""What tells texts that a model was trained on from others: one number a text, higher the more it looks like one of them.

With p(x_t) the probability of a text's token given those before it, over its n scored tokens:

- `loss`: (1/n) Σ log p(x_t) (Yeom et al. 2018, arXiv 1709.01604).
- `zlib`: that over the bytes that zlib packs the text into (Carlini et al. 2021, arXiv 2012.07805).
- `min_k`: the mean of log p over the least likely k% of the tokens (Shi et al. 2023, arXiv 2310.16789).
- `min_k++`: the same of (log p(x_t) - μ) / σ, where μ and σ are the mean and the standard deviation of log p over the vocabulary
  under p itself (Zhang et al. 2024, arXiv 2404.02936).
- `reference`: (1/n) (Σ log p(x_t) - log p_ref(x)), p_ref another model's (Carlini et al. 2021).
- `gradient`: -‖∇ of the mean loss of the text by all parameters‖.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spunge.data.samples import Encoded, Text, collate
from spunge.evaluation.likelihood import token_values
from spunge.model.loading import Base
from spunge.model.memory import halved
from spunge.model.reading import reading_of
from spunge.progress import Steps

ScoreName = Literal["loss", "zlib", "min_k", "min_k++", "reference", "gradient"]
LEAST_VARIANCE = 1e-6  # of log p over the vocabulary: a token that is certain tells nothing
TOKENS_AT_ONCE = 512  # whose distributions over the vocabulary are held in float32


def token_facts(logits: Tensor, labels: Tensor) -> Tensor:  # (n, v), (n,) -> (n, 2)
    """Of each token log p, and how many standard deviations it lies above the mean log p."""
    pieces = zip(torch.split(logits, TOKENS_AT_ONCE), torch.split(labels, TOKENS_AT_ONCE), strict=True)
    return torch.cat([_facts(*piece) for piece in pieces]) if len(labels) else logits.new_zeros(0, 2)


def _facts(logits: Tensor, labels: Tensor) -> Tensor:
    logs = logits.float().log_softmax(dim=-1)
    shares = logs.exp()
    # A token that a model rules out counts nothing: 0 times minus infinity.
    finite = logs.masked_fill(shares == 0, 0.0)
    mean = (shares * finite).sum(dim=-1)
    variance = (shares * (finite - mean[:, None]).square()).sum(dim=-1)
    own = logs.gather(1, labels[:, None])[:, 0]
    return torch.stack([own, (own - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()], dim=1)


def min_k(values: np.ndarray, percent: float) -> float:
    """Mean of the lowest `percent` of a text's values of its tokens, at least one; nan where there is none."""
    if not len(values):
        return float("nan")
    return float(np.sort(values)[: max(1, int(len(values) * percent / 100))].mean())


def zlib_bytes(text: str) -> int:
    return len(zlib.compress(text.encode("utf-8", "surrogatepass")))


def member_scores(
    base: Base,
    texts: Sequence[Text],
    coded: Sequence[Encoded],
    names: Sequence[ScoreName],
    k: float,
    reference: Callable[[], Sequence[float]],
    progress: Steps,
) -> dict[ScoreName, np.ndarray]:
    """Score -> (n,), nan for a text without a scored token. coded: the texts in the model's tokens.

    reference: gives each text's log-likelihood under the other model; asked for the score of that name alone.
    """
    facts = [each.numpy().reshape(-1, 2) for each in token_values(base, coded, token_facts, progress)]
    loss = np.array([each[:, 0].mean() if len(each) else np.nan for each in facts])
    counts = np.array([len(each) for each in facts], dtype=np.float64)
    scores: dict[ScoreName, Callable[[], np.ndarray]] = {
        "loss": lambda: loss,
        "zlib": lambda: loss / np.array([zlib_bytes(text.completion) for text in texts]),
        "min_k": lambda: np.array([min_k(each[:, 0], k) for each in facts]),
        "min_k++": lambda: np.array([min_k(each[:, 1], k) for each in facts]),
        "reference": lambda: loss - np.array(reference()) / np.where(counts > 0, counts, np.nan),
        "gradient": lambda: -gradient_norms(base, coded, progress),
    }
    return {name: scores[name]() for name in names}


def gradient_norms(base: Base, coded: Sequence[Encoded], progress: Steps) -> np.ndarray:  # (n,)
    """Norm of the gradient of each text's mean loss, one text at a time. The model is left as it was, without gradients."""
    reading_of(base)
    parameters = [each for each in base.model.parameters() if each.is_floating_point()]
    before = [each.requires_grad for each in parameters]
    norms = np.full(len(coded), np.nan)
    try:
        for each in parameters:
            each.requires_grad_(True)
        sizes = [len(text.ids) for text in coded]
        singly = ([row] for row in range(len(coded)))
        measured = halved(singly, sizes, lambda rows: _norm(base, coded[rows[0]], parameters), "evaluate")
        for done, (rows, norm) in enumerate(measured):
            norms[rows[0]] = norm
            progress(done + 1, len(coded))
    finally:
        for each, needed in zip(parameters, before, strict=True):
            each.requires_grad_(needed)
    return norms


def _norm(base: Base, text: Encoded, parameters: Sequence[Tensor]) -> float:
    batch = collate([text], base.device)
    if not batch.learned:
        return float("nan")
    with torch.enable_grad():
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[0, 1:])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squares = [float(each.double().square().sum()) for each in gradients if each is not None]
    return float(np.sqrt(sum(squares)))
