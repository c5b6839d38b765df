"""TAR, tampering attack resistance (Tamirisa et al. 2024, arXiv 2408.00761, algorithm 1): forget also after fine-tuning attacks.

At each step an attack fine-tunes the weights on other forget samples than the step's own, in `attack.steps` steps of Adam:
theta_1 ... theta_K from theta. With the step's own samples, which the attack does not see,

    forget loss = mean over k of L(theta_k)      L = log V - entropy of the outputs, or -NLL, mean over tokens
    retain loss = NLL + mean over tokens and blocks of |h - h_base|     at theta

The gradient of the forget loss is that of first order, as in the authors' code (github.com/rishub-tamirisa/tamper-resistance):
each L's at its own weights theta_k, added to the retain term's at theta. What is attacked is what is trained: LoRA's factors, or
tensors.

Beside the training, four copies of what is trained are held. The authors sample attacks on
several data sets, benign ones too, and start from a model that was made to forget before; here they are `attack.steps` steps on
other rows of the same part, from the base on, without AdamW's decay; an attack's steps count alike, as theirs do by default.
Their means of entropy and of distance are over padding too, and the latter's over the embeddings; here entropy and NLL are of
the learned tokens, distances of all tokens. gamma 4, alpha 1 and the attack's rates are theirs. A part of one batch has no
other rows: the attack then trains on the step's own. No figure of the paper was measured again here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from spunge.data.samples import Batch
from spunge.model.architecture import find_blocks
from spunge.recipe.block import Strict
from spunge.unlearning.batches import Stream, learned_tokens, share
from spunge.unlearning.calls import FORGET, RETAIN, Group
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.me_gd import unevenness
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, Term, descend, needs_retain
from spunge.unlearning.rectifying import taken
from spunge.unlearning.rr import distance, states_of, tokens
from spunge.unlearning.trained import stored_entries


class Attack(Strict):
    """The attack that is to be withstood."""

    steps: int = Field(4, ge=1, description="K: steps of the attack before each of the model's.")
    learning_rate: float = Field(4e-5, gt=0, description="Of the attack's Adam. Published: 2e-5, 4e-5 or 1e-4.")


class TARSettings(OutputSettings):
    method: str = "tar"
    attack: Attack = Field(default=Attack(), description="The attack that is to be withstood.")
    withstand: Literal["entropy", "nll"] = Field(
        "entropy",
        description="What is to be high after the attack: the entropy of the outputs on forget samples, or these samples' NLL, "
        "which has no bound.",
    )
    gamma: float = Field(4.0, ge=0, description="Weight of the forget term.")
    retain_loss: Literal["nll+states"] = Field(  # type: ignore[assignment]
        "nll+states", description="The retain samples' NLL, and the distance of the hidden states from the base's."
    )


def unlearn(task: Task, settings: TARSettings) -> Branch:
    """Unlearn in a way that simulated fine-tuning attacks do not undo (tampering attack resistance)."""
    forget, every = forget_stream(task, settings), range(len(find_blocks(task.base.model)))

    def loss(session: Session, batch: Batch) -> Tensor:
        parameters, steps = session.trained.parameters, settings.attack.steps
        value, total = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
        with attacked(parameters, settings.attack.learning_rate) as adversary:
            for rows in drawn(forget, batch, steps, task.seed):
                adversary_step(adversary, session, forget, rows)
                after = withstood(session, batch, settings)
                for each, gradient in zip(total, gradients_of(after, parameters), strict=True):
                    each.add_(gradient, alpha=1 / steps)
                value += float(after.detach()) / steps
        return Known.apply(value, total, *parameters)  # type: ignore[no-untyped-call, no-any-return]

    def retained(session: Session, held: Batch) -> Term:
        beside = states_of(session, held, every)
        kept = beside.outputs.mean()
        moved = distance(beside.after, beside.before, held.mask)
        total = kept * share(held, learned_tokens) + moved * share(held, tokens)
        return Term(total, kept.detach(), settings.alpha, {"moved": moved.detach()})

    return descend(task, settings, loss, forget=forget, retain_term=retained)


def drawn(forget: Stream, batch: Batch, steps: int, seed: int) -> list[list[int]]:
    """The rows of each step of an attack: none of the batch's own, unless there are no others."""
    own = set(batch.drawn or batch.rows)
    rows = [row for row in range(forget.count) if row not in own] or sorted(own)
    generator = np.random.default_rng([seed, forget.drawn])
    return [generator.choice(rows, min(forget.size, len(rows)), replace=False).tolist() for _ in range(steps)]


@contextmanager
def attacked(parameters: Sequence[nn.Parameter], learning_rate: float) -> Iterator[torch.optim.Optimizer]:
    """Inside the block the weights are the attack's, which its optimizer steps; then both are what they were."""
    gradients, held = taken(parameters), [parameter.detach().clone() for parameter in parameters]
    try:
        yield torch.optim.Adam(parameters, lr=learning_rate)
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, held, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        torch.clear_autocast_cache()  # which may hold these weights in another dtype, as the attack had them


def adversary_step(adversary: torch.optim.Optimizer, session: Session, forget: Stream, rows: Sequence[int]) -> None:
    """Learn some rows, in as many pieces as a batch is taken in."""
    size, parameters = -(-len(rows) // forget.pieces), session.trained.parameters
    pieces = [forget.batch(rows[start : start + size]) for start in range(0, len(rows), size)]
    learned = max(1, sum(piece.learned for piece in pieces))
    for piece in pieces:
        gradients = gradients_of(session.outputs(piece).losses().sum() / learned, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    adversary.step()
    adversary.zero_grad()
    torch.clear_autocast_cache()


def withstood(session: Session, batch: Batch, settings: TARSettings) -> Tensor:
    """Scalar: how much the model, as it is, has of the samples."""
    scored = session.outputs(batch)
    return unevenness(scored, "paper") if settings.withstand == "entropy" else -scored.mean()


def gradients_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return list(gradients)


class Known(torch.autograd.Function):
    """A loss of some parameters whose value and gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: float, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(factors[0] * gradient for gradient in ctx.gradients))


def calls(settings: TARSettings, depth: int) -> list[Group]:
    retain: list[Group] = [(RETAIN._replace(gradient=False, blocks=depth), RETAIN)] if settings.alpha else []
    return [(FORGET,), (FORGET._replace(beside=settings.withstand == "entropy"),)] * settings.attack.steps + retain


COPIES = 4  # the weights before the attack, the sum of gradients, and the two moments of the attack's Adam

TAR = Method(
    settings=TARSettings,
    source="Tamirisa et al. 2024, arXiv 2408.00761",
    unlearn=unlearn,
    calls=calls,
    copies=COPIES,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
)
