"""Norms and gated blocks as one node of the gradient's graph each: what they compute on the way is not kept, but computed again."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from spunge.unlearning.quick.products import Cast, multiplied


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (.., d) -> (.., d), as Llama's: in float32, then in x's dtype times the weight."""
    return _Normed.apply(x, weight, epsilon)  # type: ignore[no-untyped-call, no-any-return]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.to(torch.float32) * inverse
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * unit.to(x.dtype)).to(torch.float32).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_unit = (gradient * weight).to(torch.float32)
        along = (of_unit * unit).mean(-1, keepdim=True)
        return of_unit.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), of_weight, None


def normed_by_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same by torch's own kernel, one operation forward and one back on a GPU; in bfloat16 it rounds once, after the weight."""
    if x.dtype != weight.dtype:
        return normed(x, weight, epsilon)
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def gated(
    x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, cast: Mapping[nn.Module, Cast] = MappingProxyType({})
) -> Tensor:
    """down(silu(gate(x)) * up(x)). cast: as of `product_of`."""
    return multiplied(_Gated.apply(*multiplied(x, [gate, up], cast)), [down], cast)[0]  # type: ignore[no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)
