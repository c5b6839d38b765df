"""Quantisation: weights rounded to few bits fall back on the base's values where unlearning moved them less than a step.

Every linear layer but the output head is rounded and put back into the model's dtype, so that it runs on any machine;
embeddings, norms and biases stay. After Zhang et al. 2024, "Does your LLM truly unlearn?" (arXiv 2410.16454).

    - {kind: audit, of: capitals, attack: {kind: quantise, bits: rtn4}}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spunge.evaluation.attacks.attack import Attack
from spunge.evaluation.attacks.target import Target
from spunge.evaluation.evaluator import Bench, Measure
from spunge.model.loading import Base
from spunge.recipe.evaluating import AttackSettings
from spunge.weights.overlay import restored

GROUP = 64  # weights that share a scale, at 4 bits
LEVELS = {"int8": 127, "rtn4": 7}  # on either side of 0
# Quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantiseSettings(AttackSettings):
    kind: str = "quantise"
    bits: Literal["int8", "rtn4", "nf4"] = Field(
        "rtn4",
        description="int8: to the nearest of 255 even levels between minus and plus the greatest of a row (output channel). "
        "rtn4: of 15, in groups of 64. nf4: of bitsandbytes' 16 normal-float levels, in groups of 64.",
    )


def run(base: Base, attack: QuantiseSettings, target: Target, bench: Bench) -> list[Measure]:
    """Round the weights to 8 or 4 bits and measure again."""
    with rounded(base, attack.bits):
        measures = target.measured(base, bench, ["quantise", attack.bits])
    return [target.again(measure, f"quantised to {attack.bits}") for measure in measures]


@contextmanager
def rounded(base: Base, bits: str) -> Iterator[None]:
    """Inside the block, the linear layers' weights are rounded. A copy of them is held meanwhile."""
    weights = {str(number): weight for number, weight in enumerate(linear_weights(base.model))}
    with restored(weights, weights), torch.no_grad():
        for weight in weights.values():
            weight.copy_(dequantised(weight, bits))
        yield


def linear_weights(model: nn.Module) -> list[Tensor]:
    """The weights of every linear layer but the output head, each as a matrix (out, in); stacked experts (e * out, in)."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    matrices: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            matrices.append(module.weight.detach())
        elif isinstance(module, Conv1D):
            matrices.append(module.weight.detach().T)
        elif not isinstance(module, nn.modules.conv._ConvNd):
            own = module.parameters(recurse=False)
            matrices += [weight.detach().view(-1, weight.shape[2]) for weight in own if weight.ndim == 3]
    return matrices


def dequantised(weight: Tensor, bits: str) -> Tensor:
    """The weights (out, in) as they are after rounding, float32. A row's last group may be smaller."""
    rows, columns = weight.shape
    size = columns if bits == "int8" else GROUP
    groups = nn.functional.pad(weight.float(), (0, -columns % size)).view(rows, -1, size)
    largest = groups.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if bits == "nf4":
        levels = torch.tensor(NF4, device=weight.device)
        nearest = torch.bucketize(groups / largest, (levels[1:] + levels[:-1]) / 2)
        rounded_groups = levels[nearest] * largest
    else:
        scale = largest / LEVELS[bits]
        rounded_groups = torch.round(groups / scale) * scale
    return rounded_groups.reshape(rows, -1)[:, :columns]


QUANTISE = Attack(settings=QuantiseSettings, source="Zhang et al. 2024, arXiv 2410.16454", run=run, whole=True)
