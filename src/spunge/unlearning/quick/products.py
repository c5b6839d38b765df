"""Linear layers that read one input, with or without LoRA beside them, as one node of the gradient's graph.

    y_i = x W_i' + b_i + s_i (x A_i') B_i'

peft computes it layer by layer: the input is cast to the factors' float32 and kept so, and each factor's output is added in
passes of its own. Here the factors are cast instead (in `casting.py` all at once, where that is cheaper), products are added to
what is there, the input is kept once for all layers, and the layers' A make one product. W and b are frozen.

The same of layers that are packed: each is unpacked for the time of a product, as bitsandbytes does it. One in 8 bits computes its
own product forward, for a GPU rounds x as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.unlearning.forms import forms_of
from spunge.weights.packed import is_packed, packed_values

SPARSE = 0.1  # dropout up to here draws the places that are dropped, not a number for every place


# A, and B times LoRA's scale and what makes up for the dropout, in the dtype of the products.
Cast = tuple[Tensor, Tensor]
Unpack = Callable[[torch.dtype], Tensor]
Multiply = Callable[[Tensor], Tensor]


class Product(NamedTuple):
    """A linear layer, and the factors beside it if there are any."""

    dtype: torch.dtype | None  # of the weight's values; None: x's
    weight: Tensor  # (out, in); as it is packed where `unpack` is given
    unpack: Unpack | None  # the weight's values (out, in)
    multiply: Multiply | None  # x W' + b by the layer's own way, where it is not by these values
    bias: Tensor | None  # (out,)
    down: Tensor | None = None  # (r, in), LoRA's A
    up: Tensor | None = None  # (out, r), its B
    factor: float = 1.0  # of x A' B': LoRA's scale, and what makes up for the dropout
    dropout: float = 0.0  # share of x that the factors do not see


def product_of(layer: Any, cast: Mapping[nn.Module, Cast] = MappingProxyType({})) -> Product | None:
    """What a layer computes as it is now; None where it is more than this, or where it is watched by hooks. cast: factors that were
    cast already, by layer."""
    if not is_adapted(layer):
        return _plain(layer)
    if is_watched(layer) or layer.merged:
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
        return Product(*plain[:5], *cast[layer], 1.0, share)
    return Product(*plain[:5], down.weight, up.weight, layer.scaling[name] / (1 - share), share)


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer is peft's around a linear one, or around one that is packed."""
    from peft.tuners.lora.layer import Linear

    kind = type(layer)
    packed = kind.__module__ == "peft.tuners.lora.bnb" and kind.__name__ in ("Linear4bit", "Linear8bitLt")
    return kind is Linear or packed


def _plain(layer: Any) -> Product | None:
    """Of a frozen layer without factors."""
    if type(layer) is not nn.Linear and not is_packed(layer):
        return None
    if is_watched(layer) or any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if type(layer) is nn.Linear:
        return Product(layer.weight.dtype, layer.weight, None, None, layer.bias)
    values = packed_values(layer)
    if values is None or (layer.bias is not None and values.dtype not in (layer.bias.dtype, None)):
        return None
    return Product(values.dtype, layer.weight, values.unpack, values.multiply, layer.bias)


def dtype_of_products(device: str, otherwise: torch.dtype) -> torch.dtype:
    """Of what layers multiply on a kind of device: autocast's inside it."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else otherwise


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
    dtype = dtype_of_products(device, x.dtype)
    alike = all(product.dtype in (dtype, None) and product.weight.device == x.device for product in products)
    adapted = any(product.down is not None for product in products)
    if len(products) < len(layers) or not alike or not (adapted or len(layers) > 1):
        return None
    _, weights, unpacks, ways, biases, downs, ups, factors, dropouts = zip(*products, strict=True)
    with torch.autocast(device, enabled=False):
        outs: tuple[Tensor, ...] = _Multiplied.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), factors, dropouts, unpacks, ways, *weights, *biases, *downs, *ups
        )
    return outs


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Sequence[float],
        dropouts: Sequence[float],
        unpacks: Sequence[Unpack | None],
        ways: Sequence[Multiply | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        flat, count = x.reshape(-1, x.shape[-1]), len(factors)
        weights, biases, downs, ups = (tensors[start : start + count] for start in range(0, 4 * count, count))
        groups = _groups(downs, dropouts, forms_of(x.device).one_dropout)
        joined = [
            _joined([down.to(flat.dtype) for each in group if (down := downs[each]) is not None]) for group in groups
        ]
        drawn = [_drawn(flat, share) if (share := dropouts[group[0]]) else None for group in groups]
        reads: list[Tensor | None] = [None] * count
        for group, down, kept in zip(groups, joined, drawn, strict=True):
            sizes = [len(each) for at in group if (each := downs[at]) is not None]
            read = (flat if kept is None else _seen(flat, kept)) @ down.t()
            for at, part in zip(group, torch.split(read, sizes, 1) if len(sizes) > 1 else [read], strict=True):
                reads[at] = part
        outs = []
        for stored, unpack, way, bias, up, each, factor in zip(
            weights, unpacks, ways, biases, ups, reads, factors, strict=True
        ):
            if way is None:
                weight = stored if unpack is None else unpack(x.dtype)
                assert weight is not None
                out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
            else:
                out = way(flat)
            if up is not None and each is not None:
                out.addmm_(each, _times(up, factor).to(x.dtype).t())
            outs.append(out.view(*x.shape[:-1], -1))
        ctx.shape, ctx.factors, ctx.groups, ctx.unpacks = x.shape, factors, groups, unpacks
        ctx.dtypes = [down.dtype if down is not None else None for down in downs]
        ctx.save_for_backward(flat if groups else None, *joined, *drawn, *reads, *weights, *ups)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, *saved = ctx.saved_tensors
        count, groups = len(gradients), ctx.groups
        joined, drawn, saved = saved[: len(groups)], saved[len(groups) : 2 * len(groups)], saved[2 * len(groups) :]
        reads, weights, ups = (saved[start : start + count] for start in range(0, 3 * count, count))
        flats = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_ups: list[Tensor | None] = [None] * count
        of_downs: list[Tensor | None] = [None] * count
        of_reads: list[Tensor] = [flats[0]] * count  # (n, r) of each layer that has factors
        for at, (gradient, read, up, factor) in enumerate(zip(flats, reads, ups, ctx.factors, strict=True)):
            if read is not None:
                of_ups[at] = _times((gradient.t() @ read).to(up.dtype), factor)
                of_reads[at] = gradient @ _times(up, factor).to(gradient.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            for gradient, stored, unpack in zip(flats, weights, ctx.unpacks, strict=True):
                weight = stored if unpack is None else unpack(gradient.dtype)
                of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
        for group, down, kept in zip(groups, joined, drawn, strict=True):
            of_read = _joined([of_reads[at] for at in group], 1)
            of_down = of_read.t() @ (flat if kept is None else _seen(flat, kept))
            sizes = [of_reads[at].shape[1] for at in group]
            for at, part in zip(group, torch.split(of_down, sizes) if len(sizes) > 1 else [of_down], strict=True):
                of_downs[at] = part.to(ctx.dtypes[at])
            if of_x is not None and kept is None:
                of_x.addmm_(of_read, down)
            elif of_x is not None:
                of_x += _seen(of_read @ down, kept, aside=False)
        nothing = [None] * (4 + 2 * count)
        return None if of_x is None else of_x.view(ctx.shape), *nothing, *of_downs, *of_ups


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def _joined(tensors: Sequence[Tensor], dimension: int = 0) -> Tensor:
    """One of them as it is: to join it would be to copy it."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dimension)


def _groups(downs: Sequence[Tensor | None], dropouts: Sequence[float], one_dropout: bool) -> list[list[int]]:
    """The layers that have factors, in groups whose factors see the same of x: all of it, or what one drawing of a dropout leaves.
    Without `one_dropout` each layer's dropout is drawn for itself."""
    groups: dict[tuple[float, int], list[int]] = {}
    for at, (down, share) in enumerate(zip(downs, dropouts, strict=True)):
        if down is not None:
            groups.setdefault((share, 0 if one_dropout or not share else at), []).append(at)
    return list(groups.values())


def _drawn(x: Tensor, share: float) -> Tensor:
    """A dropout of x (n, d), each entry with the probability `share`: the numbers of those that are dropped (k,), or a mask of x's
    shape of those that are kept.

    Where few are, the distances between them are drawn, which are geometric, in place of a number for every entry.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - share)
    if share > SPARSE:
        return torch.rand(x.shape) >= share
    rate, expected = -math.log1p(-share), x.numel() * share
    last, pieces = -1, []
    while last < x.numel() - 1:
        distances = torch.empty(int(expected + 5 * math.sqrt(expected)) + 8, dtype=torch.float64)
        places = distances.exponential_(rate).long().add_(1).cumsum(0).add_(last)
        pieces.append(places)
        last = int(places[-1])
    places = torch.cat(pieces)
    return places[places < x.numel()]


def _seen(x: Tensor, drawn: Tensor, *, aside: bool = True) -> Tensor:
    """x with zeros where it is dropped; aside: as a copy."""
    if drawn.dtype == torch.bool:
        return x * drawn if aside else x.mul_(drawn)
    left = x.clone() if aside else x
    left.view(-1)[drawn] = 0
    return left
