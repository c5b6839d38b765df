"""LoRA's factors in the dtype of the base's weights, all of them at once.

The factors that are trained are float32, the products are not. Layer by layer each factor would be cast by an operation of its
own, forward and backward, its gradient too: a quarter of what a step asks of a GPU. Here it is one operation on the list of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spunge.unlearning.quick.products import Cast, dtype_of_products, is_adapted, product_of


@contextmanager
def cast_at_each_call(model: nn.Module) -> Iterator[dict[nn.Module, Cast]]:
    """Yields a mapping of layers to their factors, which is filled while the model is called, and empty otherwise: between two
    calls an optimizer may write into the factors, and none tells so."""
    layers = [module for module in model.modules() if is_adapted(module)]
    cast: dict[nn.Module, Cast] = {}

    def fill(*_: Any) -> None:
        cast.clear()
        cast.update(_cast(layers))

    def clear(*_: Any) -> None:
        cast.clear()

    hooks = [model.register_forward_pre_hook(fill), model.register_forward_hook(clear, always_call=True)]
    try:
        yield cast
    finally:
        for hook in hooks:
            hook.remove()


def _cast(layers: Sequence[nn.Module]) -> dict[nn.Module, Cast]:
    """Of the layers whose factors are on."""
    known, downs, ups, scales = [], [], [], []
    for layer in layers:
        product = product_of(layer)
        if product is not None and product.down is not None and product.up is not None:
            known.append((layer, product.dtype or dtype_of_products(product.weight.device.type, torch.float32)))
            downs.append(product.down)
            ups.append(product.up)
            scales.append(product.factor)
    if not known:
        return {}
    dtypes = [dtype for _, dtype in known]
    made = _Cast.apply(dtypes, scales, *downs, *ups)  # type: ignore[no-untyped-call]
    return {layer: (made[at], made[at + len(known)]) for at, (layer, _) in enumerate(known)}


class _Cast(torch.autograd.Function):
    """A (r, in) and B (out, r) of all layers -> A and scale B in the layers' dtypes."""

    @staticmethod
    def forward(
        ctx: Any, dtypes: Sequence[torch.dtype], scales: Sequence[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.kinds = scales, [factor.dtype for factor in factors]
        count = len(scales)
        made = [torch.empty_like(each, dtype=dtype) for each, dtype in zip(factors, [*dtypes, *dtypes], strict=True)]
        torch._foreach_copy_(made, [*factors[:count], *torch._foreach_mul(factors[count:], scales)])
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.scales)
        reached = [at for at, gradient in enumerate(gradients) if gradient is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        made = [torch.empty_like(each, dtype=ctx.kinds[at]) for at, each in zip(reached, given, strict=True)]
        if made:
            torch._foreach_copy_(made, given)
        ups = [(each, ctx.scales[at - count]) for at, each in zip(reached, made, strict=True) if at >= count]
        if ups:
            torch._foreach_mul_([each for each, _ in ups], [scale for _, scale in ups])
        whole: list[Tensor | None] = [None] * len(gradients)
        for at, each in zip(reached, made, strict=True):
            whole[at] = each
        return (None, None, *whole)
