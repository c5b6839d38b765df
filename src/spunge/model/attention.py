"""Attention in bfloat16 on a CPU, as batched matrix products over blocks of queries.

torch's `scaled_dot_product_attention` is slow there: forward and backward took 2.5 to 6 times what they take here (2 cores of
an AMD EPYC with avx512_bf16; docs/rmu.md has the figures of whole steps). It computes the same, up to rounding: scores and
probabilities are rounded to bfloat16, sums are in float32.

Blocks of queries see only the keys that some query of the block may see, so that a causal mask saves almost half. The
probabilities are computed again in the backward pass, so that no (t, t) matrix is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "spunge_blocked"
MOST = 64  # queries of a block
FAR = -1e30  # added to a score, leaves nothing of its probability; a row of such scores alone stays finite

Span = tuple[int, int]  # first key, and the one after the last


def speed_up(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let a model on a CPU in bfloat16 call this attention wherever it would call transformers' sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if device.type != "cpu" or dtype != torch.bfloat16 or not has_bfloat16_products():
        return
    # Whoever does not look his attention up by name at every call would not find this one.
    if not getattr(model, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = NAME


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; else sdpa is no slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: (b, h, t, d), (b, k, t, d), (b, k, t, d), mask (b or 1, 1 or h, t, t) -> (b, t, h, d).

    Whatever is out of the ordinary (dropout, a cache, a mask to be added, another dtype) is left to sdpa.
    """
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    if not _ordinary(module, query, key, value, attention_mask, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spans = _spans(query.shape[2], attention_mask)
    with torch.autocast("cpu", enabled=False):
        return _Blocked.apply(query, key, value, attention_mask, scale, spans), None  # type: ignore[no-untyped-call]


def _ordinary(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    length, causal = query.shape[2], options.get("is_causal")
    plain = (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and key.shape[2] == value.shape[2] == length > 1
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux"))
        and not options.get("output_attentions")
    )
    if mask is None:
        return plain and (getattr(module, "is_causal", True) if causal is None else bool(causal))
    return plain and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == length


def _rows(length: int) -> int:
    """Queries of a block: at most MOST, and so many that the last block is almost full."""
    return -(-length // -(-length // MOST))


def _spans(length: int, mask: Tensor | None) -> list[Span]:
    """The keys that some query of each block sees; all of them where the mask leaves none."""
    rows = _rows(length)
    if mask is None:
        return [(0, min(length, start + rows)) for start in range(0, length, rows)]
    if length <= rows:
        return [(0, length)]
    spans: list[Span] = []
    for start in range(0, length, rows):
        seen = mask[:, :, start : start + rows].flatten(0, 2).any(dim=0).nonzero()
        spans.append((int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, length))
    return spans


class _Blocked(torch.autograd.Function):
    """softmax(q k^T scale) v, block by block of queries; in each product the heads that share a key lie one below the other."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, spans: list[Span]
    ) -> Tensor:
        shared, length = key.shape[1:3]
        keys, values, hidden = _flat(key), _flat(value), _hidden(mask, length)
        blocks = _arranged(query, shared)
        given = blocks.new_empty(*blocks.shape[:3], value.shape[3])
        room = blocks.new_empty(blocks[0, :, :, 0].numel() * max(last - first for first, last in spans))
        for number, (first, last) in enumerate(spans):
            weights = _weights(blocks[number], keys[:, first:last], hidden(number, first, last), scale, room)
            torch.bmm(weights, values[:, first:last], out=given[number])
        # Of a single block they are no larger than the queries.
        ctx.save_for_backward(query, key, value, mask, weights if len(spans) == 1 else None)
        ctx.scale, ctx.spans = scale, spans
        return _put_back(given, query.shape[0], shared, length).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, mask, kept = ctx.saved_tensors
        shared, length = key.shape[1:3]
        keys, values, hidden = _flat(key), _flat(value), _hidden(mask, length)
        blocks, given = _arranged(query, shared), _arranged(gradients[0].transpose(1, 2), shared)
        to_query = torch.empty_like(blocks)
        # Sums over the blocks, in float32.
        to_key, to_value = (flat.new_zeros(flat.shape, dtype=torch.float32) for flat in (keys, values))
        size = blocks[0, :, :, 0].numel() * max(last - first for first, last in ctx.spans)
        room, more = blocks.new_empty(size), blocks.new_empty(size)
        for number, (first, last) in enumerate(ctx.spans):
            block, above, seen = blocks[number], given[number], keys[:, first:last]
            weights = _weights(block, seen, hidden(number, first, last), ctx.scale, room) if kept is None else kept
            to_value[:, first:last] += torch.bmm(weights.transpose(1, 2), above)
            to_weights = _shaped(more, weights)
            torch.bmm(above, values[:, first:last].transpose(1, 2), out=to_weights)
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_key[:, first:last] += torch.bmm(to_scores.transpose(1, 2), block)
            torch.bmm(to_scores, seen, out=to_query[number])
        to_query *= ctx.scale
        to_key *= ctx.scale
        queries = _put_back(to_query, query.shape[0], shared, length).flatten(2, 3).transpose(1, 2)
        return queries, to_key.to(key.dtype).view(key.shape), to_value.to(key.dtype).view(value.shape), None, None, None


def _flat(states: Tensor) -> Tensor:  # (b, k, t, d) -> (b * k, t, d)
    return states.contiguous().flatten(0, 1)


def _arranged(states: Tensor, shared: int) -> Tensor:
    """(b, h, t, d) -> (blocks, b * k, g * rows, d), the last block filled up with zeros."""
    batch, heads, length, size = states.shape
    rows = _rows(length)
    if lacking := -length % rows:
        states = torch.nn.functional.pad(states, (0, 0, 0, lacking))
    groups, blocks = heads // shared, -(-length // rows)
    apart = states.view(batch, shared, groups, blocks, rows, size)
    return apart.permute(3, 0, 1, 2, 4, 5).reshape(blocks, batch * shared, groups * rows, size)


def _put_back(blocks: Tensor, batch: int, shared: int, length: int) -> Tensor:
    """(blocks, b * k, g * rows, d) -> (b, t, k, g, d)."""
    rows = _rows(length)
    apart = blocks.view(len(blocks), batch, shared, blocks.shape[2] // rows, rows, -1)
    return apart.permute(1, 0, 4, 2, 3, 5).flatten(1, 2)[:, :length]


def _hidden(mask: Tensor | None, length: int) -> Callable[[int, int, int], Tensor]:
    """What is added to a block's scores (b, h, rows, keys), or to those of its last keys: 0, and FAR where a key is hidden."""
    rows = _rows(length)
    if mask is not None:
        added = torch.nn.functional.pad((~mask).to(torch.bfloat16).mul_(FAR), (0, 0, 0, -length % rows))
        return lambda number, first, last: added[:, :, number * rows : (number + 1) * rows, first:last]
    # Causal: what lies before the block is seen by all of it.
    corner = torch.full((rows, rows), FAR, dtype=torch.bfloat16).triu_(1)
    return lambda number, first, last: corner[:, : last - number * rows]


def _weights(block: Tensor, keys: Tensor, hidden: Tensor, scale: float, room: Tensor) -> Tensor:
    """Probabilities (b * k, g * rows, keys), in `room`."""
    scores = room[: block[:, :, 0].numel() * keys.shape[1]].view(*block.shape[:2], -1)
    torch.baddbmm(block.new_empty(1), block, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
    rows, last = hidden.shape[-2:]
    scores.view(len(hidden) if hidden.dim() == 4 else 1, -1, rows, keys.shape[1])[..., -last:] += hidden
    return torch.softmax(scores, dim=-1, out=scores)


def _shaped(room: Tensor, like: Tensor) -> Tensor:
    return room[: like.numel()].view(like.shape)
