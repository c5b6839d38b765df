"""Load a model whose linear layers are packed in 4 or 8 bits (`model.train_in`), through bitsandbytes, to train LoRA beside it."""

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spunge.recipe.model import PackedIn
from spunge.weights.importing import import_peft

TOLD: dict[PackedIn, str] = {"4bit": "4 bits (nf4, its scales in 8 bits)", "8bit": "8 bits (int8)"}


def load_packed(
    kind: Any, folder: Path, config: Any, dtype: torch.dtype, trust: bool, device: torch.device, packed_in: PackedIn
) -> Any:
    """A model of the auto class `kind`, its linear layers packed as they are read, its output layer and the rest in `dtype`.

    4bit: nf4 in blocks, their scales quantised again (Dettmers et al. 2023, arXiv 2305.14314). 8bit: int8 by rows, inputs beyond
    6 apart in 16 bits (Dettmers et al. 2022, arXiv 2208.07339); on a CPU all inputs as they are.
    """
    import_peft()  # and bitsandbytes with it
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each cast of each layer
    if packed_in == "4bit":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        how = BitsAndBytesConfig(load_in_8bit=True)
    model = kind.from_pretrained(
        folder,
        config=copy.deepcopy(config),
        dtype=dtype,
        trust_remote_code=trust,
        quantization_config=how,
        device_map={"": device},
    )
    _compute_alike(model)
    return model


def _compute_alike(model: nn.Module) -> None:
    """A CPU has a way of its own for passes outside of training: in 4 bits, on some, in bfloat16 whatever is asked for; in 8 bits
    with what a layer is given rounded too. A reference computed so would not be the model that is trained."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.state.__class__ = _always_in_training()


@cache
def _always_in_training() -> type:
    """What bitsandbytes knows of a layer in 8 bits: that it is in training, whatever mode it is in."""
    from bitsandbytes import MatmulLtState

    class AlwaysInTraining(MatmulLtState):  # type: ignore[misc]
        is_training = property(lambda self: True, lambda self, mode: None)

    return AlwaysInTraining


def hollow(kind: Any, config: Any, trust: bool) -> Any:
    """The same model with nothing packed, without its values: it has the checkpoint's shapes."""
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(config), trust_remote_code=trust)
