"""The optimizers by name, for teaching, unlearning and relearning alike."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from spunge.recipe.training import DescentSettings, Optimizer, refuse_optimizer, stepper
from spunge.unlearning.sophia import Sophia

Parameters = Sequence[nn.Parameter]


def optimizer_of(parameters: Parameters, settings: DescentSettings, setting: str) -> torch.optim.Optimizer:
    """The optimizer that the settings name. Raises RecipeError where its package is not installed. setting: for errors."""
    refuse_optimizer(settings.optimizer, setting)
    return _MADE[stepper(settings.optimizer)](parameters, settings.learning_rate, settings.weight_decay)


def _adamw(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    # Fused: one pass over each tensor, with no temporaries.
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)


def _adamw_8bit(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return _of_bitsandbytes(AdamW8bit, parameters, rate, decay)


def _paged_adamw_8bit(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    if not any(parameter.is_cuda for parameter in parameters):
        return _adamw_8bit(parameters, rate, decay)  # nothing to page
    return _of_bitsandbytes(PagedAdamW8bit, parameters, rate, decay)


def _lion(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion

    return _of_bitsandbytes(Lion, parameters, rate, decay)


def _of_bitsandbytes(
    kind: Callable[..., torch.optim.Optimizer], parameters: Parameters, rate: float, decay: float
) -> torch.optim.Optimizer:
    return kind(parameters, lr=rate, weight_decay=decay)


def _sophia(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    return Sophia(parameters, rate, decay)


def _sgd(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True)


def _rmsprop(parameters: Parameters, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=rate, weight_decay=decay)


_MADE: Mapping[Optimizer, Callable[[Parameters, float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "lion": _lion,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "sophia": _sophia,
}
