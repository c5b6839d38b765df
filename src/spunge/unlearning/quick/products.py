"""Linear layers that read one input, with or without LoRA beside them, as one node of the gradient's graph.

    y_i = x W_i' + b_i + s_i (x A_i') B_i'

peft computes it layer by layer: the input is cast to the factors' float32 and kept so, and each factor's output is added in
passes of its own. Here the factors are cast instead (in `casting.py` all at once, where that is cheaper), products are added to
what is there, the input is kept once for all layers, and the layers' A make one product. W and b are frozen.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SPARSE = 0.1  # dropout up to here draws the places that are dropped, not a number for every place


Cast = tuple[Tensor, Tensor]  # A and LoRA's scale times B, in the dtype of the products


class Product(NamedTuple):
    """A linear layer, and the factors beside it if there are any."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    down: Tensor | None = None  # (r, in), LoRA's A
    up: Tensor | None = None  # (out, r), its B
    factor: float = 1.0  # of x A' B': LoRA's scale, and what makes up for the dropout
    dropout: float = 0.0  # share of x that the factors do not see


def product_of(layer: Any, cast: Mapping[nn.Module, Cast] = MappingProxyType({})) -> Product | None:
    """What a layer computes as it is now; None where it is more than this, or where it is watched by hooks. cast: factors that were
    cast already, by layer."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is nn.Linear:
        return _plain(layer)
    if type(layer) is not Linear or is_watched(layer) or type(layer.base_layer) is not nn.Linear or layer.merged:
        return None
    plain = _plain(layer.base_layer)
    if layer.disable_adapters or plain is None:
        return plain
    if len(layer.active_adapters) != 1 or (name := layer.active_adapters[0]) not in layer.lora_A:
        return None
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    share = dropout.p if type(dropout) is nn.Dropout else 0.0
    known = type(down) is type(up) is nn.Linear and type(dropout) in (nn.Dropout, nn.Identity)
    if not known or up.bias is not None or name in layer.lora_variant or any(map(is_watched, (down, up, dropout))):
        return None
    share = share if layer.training else 0.0
    if layer in cast:
        return Product(*plain[:2], *cast[layer], 1 / (1 - share), share)
    return Product(*plain[:2], down.weight, up.weight, layer.scaling[name] / (1 - share), share)


def _plain(layer: nn.Linear) -> Product | None:
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    return Product(layer.weight, layer.bias) if frozen and not is_watched(layer) else None


def is_watched(module: nn.Module) -> bool:
    """Whether hooks are called with what a module is given or gives."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def multiplied(
    x: Tensor, layers: Sequence[nn.Module], cast: Mapping[nn.Module, Cast] = MappingProxyType({})
) -> Sequence[Tensor]:
    """Each layer's output for x (.., in). cast: as of `product_of`."""
    return multiplied_at_once(x, layers, cast) or [layer(x) for layer in layers]


def multiplied_at_once(
    x: Tensor, layers: Sequence[nn.Module], cast: Mapping[nn.Module, Cast] = MappingProxyType({})
) -> Sequence[Tensor] | None:
    """The same as one node, as the layers themselves would give it under autocast; None where they must be called."""
    products = [product for layer in layers if (product := product_of(layer, cast)) is not None]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    alike = all((product.weight.dtype, product.weight.device) == (dtype, x.device) for product in products)
    adapted = any(product.down is not None for product in products)
    if len(products) < len(layers) or not alike or not (adapted or len(layers) > 1):
        return None
    weights, biases, downs, ups, factors, dropouts = zip(*products, strict=True)
    with torch.autocast(device, enabled=False):
        outs: tuple[Tensor, ...] = _Multiplied.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), factors, dropouts, *weights, *biases, *downs, *ups
        )
    return outs


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Sequence[float], dropouts: Sequence[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat, count = x.reshape(-1, x.shape[-1]), len(factors)
        weights, biases, downs, ups = (tensors[start : start + count] for start in range(0, 4 * count, count))
        dropped = [_dropped(flat, share) if share else None for share in dropouts]
        reads = _read(flat, downs, dropped)
        outs = []
        for weight, bias, up, read, factor in zip(weights, biases, ups, reads, factors, strict=True):
            assert weight is not None
            out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
            if up is not None and read is not None:
                out.addmm_(read, _times(up, factor).to(x.dtype).t())
            outs.append(out.view(*x.shape[:-1], -1))
        ctx.shape, ctx.factors = x.shape, factors
        ctx.save_for_backward(
            flat if any(read is not None for read in reads) else None, *reads, *dropped, *weights, *downs, *ups
        )
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, *saved = ctx.saved_tensors
        count = len(gradients)
        reads, dropped, weights, downs, ups = (saved[start : start + count] for start in range(0, 5 * count, count))
        flats = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_ups: list[Tensor | None] = []
        of_reads: list[Tensor | None] = []  # (n, r) each, as `reads`
        for gradient, read, up, factor in zip(flats, reads, ups, ctx.factors, strict=True):
            of_ups.append(None if read is None else _times((gradient.t() @ read).to(up.dtype), factor))
            of_reads.append(None if read is None else gradient @ _times(up, factor).to(gradient.dtype))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = flats[0] @ weights[0]
            for gradient, weight in zip(flats[1:], weights[1:], strict=True):
                of_x.addmm_(gradient, weight)
        of_downs = _through_reads(flat, of_x, of_reads, downs, dropped)
        nothing = [None] * (2 + 2 * count)
        return None if of_x is None else of_x.view(ctx.shape), *nothing, *of_downs, *of_ups


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def _joined(tensors: Sequence[Tensor], dimension: int = 0) -> Tensor:
    """One of them as it is: to join it would be to copy it."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dimension)


def _whole(downs: Sequence[Tensor | None], dropped: Sequence[Tensor | None]) -> list[int]:
    """Which layers' factors see all of x."""
    return [each for each, down in enumerate(downs) if down is not None and dropped[each] is None]


def _read(flat: Tensor, downs: Sequence[Tensor | None], dropped: Sequence[Tensor | None]) -> list[Tensor | None]:
    """x A' (n, r) of each layer that has factors."""
    whole = _whole(downs, dropped)
    chosen = [down.to(flat.dtype) for each in whole if (down := downs[each]) is not None]
    sizes = [len(down) for down in chosen]
    shared = iter(torch.split(flat @ _joined(chosen).t(), sizes, 1) if chosen else ())
    reads: list[Tensor | None] = []
    for down, lost in zip(downs, dropped, strict=True):
        if down is None:
            reads.append(None)
        else:
            reads.append(next(shared) if lost is None else _without(flat, lost) @ down.to(flat.dtype).t())
    return reads


def _through_reads(
    flat: Tensor,
    of_x: Tensor | None,
    of_reads: Sequence[Tensor | None],
    downs: Sequence[Tensor | None],
    dropped: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the A, given those of x A'; adds to x's, if there is one, what reaches it through the factors."""
    whole = _whole(downs, dropped)
    chosen = [down.to(flat.dtype) for each in whole if (down := downs[each]) is not None]
    of_downs: list[Tensor | None] = [None] * len(downs)
    if chosen:
        of_shared = _joined([of_read for each in whole if (of_read := of_reads[each]) is not None], 1)
        parts = torch.split(of_shared.t() @ flat, [len(down) for down in chosen])
        for each, part in zip(whole, parts, strict=True):
            of_downs[each] = part
        if of_x is not None:
            of_x.addmm_(of_shared, _joined(chosen))
    for each, (down, lost, of_read) in enumerate(zip(downs, dropped, of_reads, strict=True)):
        if down is not None and lost is not None and of_read is not None:
            of_downs[each] = of_read.t() @ _without(flat, lost)
            if of_x is not None:
                of_x += _without(of_read @ down.to(flat.dtype), lost, aside=False)
    return [
        None if gradient is None or down is None else gradient.to(down.dtype)
        for gradient, down in zip(of_downs, downs, strict=True)
    ]


def _dropped(x: Tensor, share: float) -> Tensor:
    """Which entries of x (n, d) are dropped, each with the probability `share`: their numbers (k,), or a mask of x's shape.

    Where few are, the distances between them are drawn, which are geometric, in place of a number for every entry.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(share)
    if share > SPARSE:
        return torch.rand(x.shape) < share
    rate, expected = -math.log1p(-share), x.numel() * share
    last, pieces = -1, []
    while last < x.numel() - 1:
        distances = torch.empty(int(expected + 5 * math.sqrt(expected)) + 8, dtype=torch.float64)
        places = distances.exponential_(rate).long().add_(1).cumsum(0).add_(last)
        pieces.append(places)
        last = int(places[-1])
    places = torch.cat(pieces)
    return places[places < x.numel()]


def _without(x: Tensor, dropped: Tensor, *, aside: bool = True) -> Tensor:
    """x with zeros where it is dropped; aside: as a copy."""
    left = x.clone() if aside else x
    if dropped.dtype == torch.bool:
        return left.masked_fill_(dropped, 0)
    left.view(-1)[dropped] = 0
    return left
