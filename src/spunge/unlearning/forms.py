"""How a training step is computed on a kind of device. Which form is taken changes the results by rounding alone.

A CPU's step waits for its caches and its arithmetic, a GPU's for the processor, which starts one operation after the other: there
few and large operations are quick. `benchmarks/launches.py` counts them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Forms:
    piece: int  # bytes of float32 logits at once
    # Places at once, at the least, over a trained output layer's width: logits so many times the size of its weights.
    widths: int
    call: int  # tokens that could be computed in the time that one more call of the model takes
    layers: bool = True  # layers that are known compute in their cheaper forms
    cast_at_once: bool = False  # LoRA's factors are cast all at once, when the model is called
    norm_by_torch: bool = False  # RMSNorm by torch's own kernel
    one_dropout: bool = False  # the factors of layers that read one input see what one drawing of their dropout leaves


FORMS = {
    "cpu": Forms(piece=1 << 24, widths=2, call=64),  # about a core's cache
    "cuda": Forms(piece=1 << 28, widths=0, call=4096, cast_at_once=True, norm_by_torch=True, one_dropout=True),
}


def forms_of(device: torch.device) -> Forms:
    """A device's; those of a CPU where its kind has none of its own."""
    return FORMS.get(device.type, FORMS["cpu"])
