"""Sophia, which SOUL unlearns with: steps scaled by an estimate of the loss's curvature, and bounded.

SOUL: Jia et al. 2024, arXiv 2404.18239; Sophia: Liu et al. 2023, arXiv 2305.14342, algorithm 3. With g a step's gradient,

    m <- beta1 m + (1 - beta1) g
    h <- beta2 h + (1 - beta2) g^2           at the first of every k steps, the diagonal of the Gauss-Newton matrix over B
    theta <- (1 - rate decay) theta - rate sign(m) min(|m| / max(rho B h, eps), 1)

B: of how many tokens a step's loss is the mean, here SOUL's constant, to which rho belongs. Sophia draws the labels whose gradient
is squared from the model; here, as SOUL does, it is the loss's own gradient, which costs no further pass.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BETAS = 0.965, 0.99
RHO = 0.04
TOKENS = 5120  # B
EVERY = 10  # k
SMALLEST = 1e-15  # eps


class Sophia(torch.optim.Optimizer):
    """Each entry's step is at most the learning rate."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "curvature": torch.zeros_like(parameter)}
        mean, curvature = state["mean"], state["curvature"]
        mean.lerp_(gradient, 1 - BETAS[0])
        if state["step"] % EVERY == 0:
            curvature.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        state["step"] += 1
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        ratio = mean.abs().div_((RHO * TOKENS * curvature).clamp_(min=SMALLEST)).clamp_(max=1)
        parameter.addcmul_(mean.sign(), ratio, value=-group["lr"])
