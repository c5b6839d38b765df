"""LAT, latent adversarial training (Sheshadri et al. 2024, arXiv 2407.15549): forget also where hidden states are pushed.

At each step an adversary seeks, for each sample, shifts of the hidden states after some blocks that bring the sample back:

    d* = argmin over d of NLL(sample | h + d),   |d| <= epsilon at every token of the prompt (of plain texts: at every token)

by `inner.steps` steps of Adam from d = 0, each followed by a projection to the ball. With d* in place the model is then trained on

    forget loss = mean over tokens of -log(1 - p(token | h + d*))

and on the retain loss without shifts. For one sample d* is the same whatever it is batched with.

The authors' code (github.com/aengusl/latent-adversarial-training) also trains towards another answer; for that take `idk` or `dpo`.

Shifts begin at 0, as in that code; theirs are added to the MLP's output, which in a Llama is the same. The forget loss is their
`away` term alone, also of tokens that they leave out, less likely than e^-5; their `toward` term, the NLL of another answer or of
`whp`'s generic tokens, is not there. Their adversary is AdamW, which decays shifts a little. epsilon 1, 16
steps, a rate of 0.05 and block 8 of 32 are those of their unlearning runs on 7B models. No figure of the paper was measured
again here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.linalg import vector_norm

from spunge.data.samples import IGNORED, Batch
from spunge.model.architecture import blocks_named, find_blocks, hidden_of, with_hidden
from spunge.recipe.block import Strict
from spunge.unlearning.calls import FORGET, Group, descending
from spunge.unlearning.head import head_of
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.scored import Scored
from spunge.unlearning.trained import stored_entries


class Inner(Strict):
    """How the adversary seeks its shifts."""

    steps: int = Field(16, ge=1, description="Steps of the adversary before each of the model's.")
    learning_rate: float = Field(0.05, gt=0, description="Of the adversary's Adam.")


class LATSettings(OutputSettings):
    method: str = "lat"
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Blocks, counted from 0, after which hidden states are shifted. Default: the one at a quarter of the depth: "
        "8 of 32, as in the authors' unlearning runs.",
    )
    epsilon: float = Field(1.0, gt=0, description="Most length of a shift, at each token and block.")
    inner: Inner = Field(default=Inner(), description="The adversary.")


def unlearn(task: Task, settings: LATSettings) -> Branch:
    """Unlearn also where an adversary shifts hidden states to bring the samples back (latent adversarial training)."""
    blocks = find_blocks(task.base.model)
    layers = layers_of(settings, len(blocks), task.setting)

    def loss(session: Session, batch: Batch) -> Tensor:
        head_of(
            session.trained.model, batch
        )  # which calls the model, so that no shifts may be in place at its first time
        with shifted(task.base.model, layers, shifts(session, batch, layers, settings)):
            return away(session.outputs(batch, in_one=True))

    return descend(task, settings, loss)


def layers_of(settings: LATSettings, depth: int, setting: str = "unlearn") -> list[int]:
    """Raises RecipeError for a block that the model has not."""
    return blocks_named(settings.layers or [depth // 4], depth, f"{setting}.layers")


def shifts(session: Session, batch: Batch, layers: Sequence[int], settings: LATSettings) -> list[Tensor]:
    """The adversary's shifts (b, t, d) after each of the blocks, float32."""
    model, where = session.task.base.model, attacked(batch, session.forget.samples.plain).unsqueeze(-1)
    shape = (*batch.ids.shape, model.config.get_text_config().hidden_size)
    given = [torch.zeros(shape, device=batch.ids.device, requires_grad=True) for _ in layers]
    adversary = torch.optim.Adam(given, lr=settings.inner.learning_rate)
    for _ in range(settings.inner.steps):
        with shifted(model, layers, given), torch.enable_grad():
            scored = session.outputs(batch, in_one=True)
            # A sum over samples of means over tokens: the gradient of a sample's shifts does not depend on the others.
            total = (scored.sums() / scored.lengths()).sum()
            with torch.autocast(batch.ids.device.type, enabled=False):
                gradients = torch.autograd.grad(total, given)
        for shift, gradient in zip(given, gradients, strict=True):
            shift.grad = gradient * where
        adversary.step()
        with torch.no_grad():
            for shift in given:
                shift.copy_(projected(shift, settings.epsilon))
    return [shift.detach() for shift in given]


def attacked(batch: Batch, plain: bool) -> Tensor:
    """(b, t), 1 where hidden states are shifted: at the tokens of the prompt, or at all tokens of a sample that has none.

    plain: the samples are texts without prompts, of which a start token, too, is not learned.
    """
    if plain:
        return batch.mask.float()
    prompt = (batch.labels == IGNORED) & batch.mask.bool()
    return torch.where(prompt.any(1, keepdim=True), prompt, batch.mask.bool()).float()


def projected(shift: Tensor, epsilon: float) -> Tensor:
    """(..., d) -> the nearest with a length of at most epsilon."""
    within: Tensor = shift / (vector_norm(shift, dim=-1, keepdim=True) / epsilon).clamp(min=1)
    return within


@contextmanager
def shifted(model: nn.Module, layers: Sequence[int], given: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block, the hidden states that some blocks give are those of the model plus these shifts (b, t, d)."""
    blocks = find_blocks(model)

    def add(shift: Tensor, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        return with_hidden(output, hidden + shift.to(hidden.dtype))

    hooks = [
        blocks[layer].register_forward_hook(partial(add, shift)) for layer, shift in zip(layers, given, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def away(scored: Scored) -> Tensor:
    """Scalar: mean over tokens of -log(1 - p)."""

    def loss(logits: Tensor, places: slice) -> Tensor:
        others = logits.scatter(1, scored.labels[places][:, None], -torch.inf)
        return logits.logsumexp(-1) - others.logsumexp(-1)

    return scored.mean_of(scored.each(loss))


def calls(settings: LATSettings, _depth: int) -> list[Group]:
    return [(FORGET,)] * settings.inner.steps + descending(settings)


LAT = Method(
    settings=LATSettings,
    source="Sheshadri et al. 2024, arXiv 2407.15549",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    needs_retain=needs_retain,
)
