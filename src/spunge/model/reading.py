"""How a model reads: what must be known of it before texts of unequal length are scored or continued in one batch.

Padding on the left needs a model that leaves it out of account, and a prompt that is run once for many candidates one that keeps
nothing but keys and values. Recurrent layers (Mamba and the hybrids of it) keep a state instead; the decoders of BART and its
kin count positions themselves. Likelihoods need a model that does not see the tokens that it predicts.
"""

import inspect
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.model.loading import Base

TOKENS = [3, 4, 5, 6]
PADDED = [3, 3, *TOKENS]
# Share of the logits' spread by which two ways to one result may differ, being rounding.
ROUNDING = {torch.float32: 1e-4}
ROUNDING_REDUCED = 5e-2  # in 16 bits
OBJECTIONS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)  # of a model that cannot be used in a way


class Reading(NamedTuple):
    """What a model does with a text."""

    padded: bool  # padding on its left changes nothing
    shared: bool  # one prompt, run once, serves several candidates


_known: WeakKeyDictionary[Any, Reading] = WeakKeyDictionary()


def reading_of(base: Base) -> Reading:
    """How the model reads, by trying it on four tokens, once a model. Raises RecipeError for one that sees later tokens, whose
    likelihoods mean nothing."""
    which = (base.beside or (base.model,))[0]  # one that is shifted by others reads as all of them do
    if which not in _known:
        _known[which] = _tried(base)
    return _known[which]


@torch.no_grad()  # no inference mode: a model in training may keep what it makes here
def _tried(base: Base) -> Reading:
    whole = _run(base, [TOKENS, [*TOKENS[:-1], TOKENS[-1] + 1]])
    logits: Tensor = whole.logits[0]
    if not _close(base, whole.logits[1, :-1], logits[:-1]):
        raise RecipeError(
            f"model: {type(base.model).__name__} sees the tokens after the one that it predicts, so it gives no likelihoods "
            "and writes no texts; a BERT-like model needs is_decoder: true in its config.json"
        )
    told = "position_ids" in inspect.signature(base.model.forward).parameters
    try:
        out = _run(base, [PADDED], told)
        padded = _close(base, out.logits[0, 2:], logits)
        shared = told and padded and _keeps_keys_and_values(out) and _close(base, _continued(base), logits[-1:])
    except OBJECTIONS:
        return Reading(False, False)
    return Reading(padded, shared)


def _run(base: Base, rows: list[list[int]], told: bool = False) -> Any:
    """The model's output on rows of ids, with all tokens but the last four masked. told: it takes positions."""
    ids = torch.tensor(rows)
    mask = torch.zeros_like(ids)
    mask[:, ids.shape[1] - len(TOKENS) :] = 1
    given = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0).to(base.device)} if told else {}
    return base.model(input_ids=ids.to(base.device), attention_mask=mask.to(base.device), use_cache=True, **given)


def _continued(base: Base) -> Tensor:  # (1, v)
    """The last token's logits, of a padded prompt first and then that token alone."""
    ids, mask = torch.tensor([PADDED]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    places = torch.tensor([[0, 0, 0, 1, 2, 3]])
    cache = None
    for piece in (slice(0, 5), slice(5, 6)):
        out = base.model(
            input_ids=ids[:, piece].to(base.device),
            attention_mask=mask[:, : piece.stop].to(base.device),
            position_ids=places[:, piece].to(base.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
    logits: Tensor = out.logits[0]
    return logits


def _close(base: Base, one: Tensor, other: Tensor) -> bool:
    there = one.isfinite() & other.isfinite()  # a token outside a nucleus has -inf
    one, other = one[there].float(), other[there].float()
    allowed = ROUNDING.get(base.dtype, ROUNDING_REDUCED) * float(other.std())
    return float((one - other).abs().max()) <= allowed


def _keeps_keys_and_values(out: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = out.get("past_key_values")
    # Others derive from these layers and keep more than they do.
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
