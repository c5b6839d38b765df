"""Linear layers whose weights bitsandbytes has packed into 4 or 8 bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes'."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


class Values(NamedTuple):
    """What a packed layer computes with."""

    dtype: torch.dtype | None  # of the values; None: of what the layer is given
    unpack: Callable[[torch.dtype], Tensor]  # (out, in): what a gradient is multiplied by, and x
    multiply: Callable[[Tensor], Tensor] | None = None  # (n, in) -> (n, out): x's product, where it is another


def packed_values(module: Any) -> Values | None:
    """Of a packed layer as bitsandbytes computes it now; None where it does so in another way."""
    return in_four_bits(module) or in_eight_bits(module)


def in_four_bits(module: Any) -> Values | None:
    """Of a layer that is packed in 4 bits; None where it is computed in another way, or is packed otherwise."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    if type(module) is not Linear4bit or (state := module.weight.quant_state) is None:
        return None
    other_way = module.support_avx512bf16_for_cpu or getattr(state, "packing_format_for_cpu", False)
    turned = tuple(state.shape) != (module.out_features, module.in_features)
    if other_way or turned or module.compute_dtype != state.dtype:
        return None
    packed = module.weight.data
    return Values(state.dtype, lambda _: functional.dequantize_4bit(packed, state))


def in_eight_bits(module: Any) -> Values | None:
    """Of a layer that is packed in 8 bits, whose inputs a GPU rounds to 8 bits as well; None where the weights are held twice, or
    are packed otherwise."""
    from bitsandbytes.nn import Linear8bitLt

    if type(module) is not Linear8bitLt or module.state.has_fp16_weights:
        return None

    def unpack(dtype: torch.dtype) -> Tensor:
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB  # moved there by the first call
        values: Tensor = module.weight.data.to(dtype)
        return values.mul_((scales / 127).unsqueeze(1))

    return Values(None, unpack, module)


def is_turned(module: Any) -> bool:
    """Whether a packed layer, which is (out, in), stands for one whose weight a checkpoint has as (in, out): GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(module.source_cls, Conv1D)


def unpacked(module: Any) -> Tensor:
    """The values that a packed layer's weight stands for, in the checkpoint's shape. Before the layer is first called."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    weight = module.weight
    if isinstance(weight, Params4bit):
        value: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        value = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return value.T if is_turned(module) else value
