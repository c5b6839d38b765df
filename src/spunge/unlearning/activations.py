"""Activation checkpointing (`model.checkpoint_activations`): a block computes again in the backward pass what it did not hold.

Losses and gradients are those of training without it; dropout draws the same numbers in the second computation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spunge.errors import RecipeError
from spunge.model.loading import Base


@contextmanager
def recomputed(base: Base) -> Iterator[None]:
    """Where the recipe asks for it, the model holds the inputs of its blocks alone inside the block, while it is in training mode.

    Raises RecipeError for an architecture whose blocks transformers cannot compute again.
    """
    if not base.checkpoint_activations:
        yield
        return
    try:
        _switch_on(base.model)
    except ValueError:
        raise RecipeError(
            f"model.checkpoint_activations: true: transformers cannot compute the blocks of {type(base.model).__name__} again; "
            "set it to false, or lower batch_size and raise accumulation"
        ) from None
    try:
        yield
    finally:
        _switch_off(base.model)


def _switch_on(model: Any) -> None:
    told = {"use_reentrant": False}
    if _renamed():
        model.activation_checkpointing_enable(told)
    else:
        model.gradient_checkpointing_enable(told)
    # Needed by the reentrant kind alone. With it a gradient would be computed down to the embeddings, whatever is trained.
    model.disable_input_require_grads()


def _switch_off(model: Any) -> None:
    if _renamed():
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def _renamed() -> bool:
    """Whether this transformers calls it activation checkpointing; older ones say gradient checkpointing."""
    from transformers import PreTrainedModel

    return "activation_checkpointing_enable" in vars(PreTrainedModel)
