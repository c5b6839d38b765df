"""Linear layers whose weights bitsandbytes has packed into 4 or 8 bits."""

from typing import Any

from torch import Tensor, nn


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes'."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


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
