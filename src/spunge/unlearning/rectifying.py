"""What is done to a step's gradient before the optimizer has it, whatever the loss: SAM and GRU.

SAM (Fan et al. 2025, arXiv 2502.05374; Foret et al. 2021, arXiv 2010.01412): the forget loss's gradient is taken at
theta + rho g / ||g||, with g its gradient at theta, so that a small change of the weights does not bring back what was forgotten.
The retain term's is taken at theta.

GRU (Wang et al. 2025, arXiv 2503.09117): with g the forget loss's gradient and r a running mean of the retain loss's, the step is
on

    g - (<g, r> / <r, r>) r   where <g, r> < 0,   else g

the vector nearest to g that does not raise the retain loss. r <- gru * (this step's) + (1 - gru) * r.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spunge.model.ranks import Ranks

Gradients = list[Tensor | None]  # of each parameter; None where none reached it


@contextmanager
def moved_up(parameters: Sequence[nn.Parameter], rho: float, ranks: Ranks) -> Iterator[None]:
    """Inside the block the weights are moved by rho along their gradient, which is emptied; then they are what they were."""
    gradients = taken(parameters)
    norm = math.sqrt(product(gradients, gradients, ranks))
    held = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and norm > 0:
                parameter.add_(gradient, alpha=rho / norm)
    del gradients
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, held, strict=True):
                parameter.copy_(value)


def taken(parameters: Sequence[nn.Parameter]) -> Gradients:
    """The parameters' gradients, which they have no longer."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def blended(
    mean: Sequence[Tensor], gradients: Gradients, parameters: Sequence[nn.Parameter], share: float
) -> list[Tensor]:
    """The running mean of gradients with those of one more step, of which it has so large a share."""
    before = mean or [torch.zeros_like(parameter) for parameter in parameters]
    return [
        (1 - share) * old if new is None else (1 - share) * old + share * new
        for old, new in zip(before, gradients, strict=True)
    ]


def rectified(forget: Gradients, retain: Sequence[Tensor], ranks: Ranks) -> Gradients:
    """The forget gradients without what goes against the retain gradients."""
    against, square = product(forget, retain, ranks), product(retain, retain, ranks)
    if against >= 0 or square == 0:
        return forget
    factor = against / square
    return [-factor * r if g is None else g - factor * r for g, r in zip(forget, retain, strict=True)]


def product(one: Sequence[Tensor | None], other: Sequence[Tensor | None], ranks: Ranks) -> float:
    """The scalar product over all parameters, and over the shares of all processes."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return ranks.sum(sum(float((a * b).sum(dtype=torch.float64)) for a, b in pairs))
