"""A model's output layer on its own: what it reads, and what the model makes of what it gives.

Most models return what the output layer gives; some scale it (Cohere, Granite), some squash it (Gemma 2). Which of them a model
does is measured, not looked up by its name: the layer's output is replaced by known numbers and the model's logits are looked
at. Where they are none of these, the model is called as a whole.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spunge.data.samples import Batch
from spunge.unlearning.trained import evaluation_mode

CLOSE = 1e-5  # relative, in float32
FAR = 60.0  # the known numbers reach from minus this to this


@dataclass(frozen=True)
class Head:
    """An output layer and what follows it."""

    layer: nn.Module  # (..., h) -> (..., v)
    after: Callable[[Tensor], Tensor]  # what the model does to the layer's output, number by number
    vocabulary: int  # v


_MEASURED: "weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module | None, Head | None]]" = weakref.WeakKeyDictionary()


def head_of(model: Any, batch: Batch) -> Head | None:
    """The model's output layer; None where the model makes more of its output than a scaled or squashed copy.

    A row of the batch is given to the model to find out, once for a model. The random numbers to come stay the same.
    """
    from peft import PeftModel

    layer = model.get_output_embeddings()
    own = model.get_base_model() if isinstance(model, PeftModel) else model  # every branch has a wrapper of its own
    if own not in _MEASURED or _MEASURED[own][0] is not layer:
        _MEASURED[own] = layer, None if layer is None else _measured(model, layer, batch)
    return _MEASURED[own][1]


@contextmanager
def reading(layer: nn.Module, places: Tensor, shape: Sequence[int]) -> Iterator[list[Tensor]]:
    """Inside the block the output layer is given nothing; yields a list of what it would have read, of (b, t, h), at n places,
    row * t + column: (n, h) for each of its calls. shape: b and t. Raises IndexError where the layer reads other places."""
    read: list[Tensor] = []

    def take(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if inputs[0].shape[:-1] != torch.Size(shape):
            raise IndexError(f"the output layer reads {tuple(inputs[0].shape)}, of {tuple(shape)} places")
        read.append(inputs[0].flatten(0, 1).index_select(0, places.to(inputs[0].device)))
        return (inputs[0][:, :0], *inputs[1:])

    hook = layer.register_forward_pre_hook(take)
    try:
        yield read
    finally:
        hook.remove()


def _measured(model: Any, layer: nn.Module, batch: Batch) -> Head | None:
    ids, mask = batch.ids[:1], batch.mask[:1]
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), evaluation_mode(model):
            return _tried(model, layer, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None  # a model that cannot do without its logits


def _tried(model: Any, layer: nn.Module, arguments: dict[str, Any]) -> Head | None:
    given: list[Tensor] = []

    def replace(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        given.append(torch.linspace(-FAR, FAR, out.numel(), device=out.device).reshape(out.shape))
        return given[-1]

    hook = layer.register_forward_hook(replace)
    try:
        logits = model(**arguments).logits
    finally:
        hook.remove()
    if len(given) != 1 or given[0].shape != logits.shape or logits.ndim != 3:
        return None
    after = _after(given[0], logits.to(given[0].dtype), model.config.get_text_config())
    ids = arguments["input_ids"]
    with reading(layer, torch.arange(ids.numel(), device=ids.device), ids.shape) as read:
        model(**arguments)
    if after is None or len(read) != 1 or read[0].ndim != 2:
        return None
    return Head(layer, after, logits.shape[-1])


def _after(given: Tensor, logits: Tensor, config: Any) -> Callable[[Tensor], Tensor] | None:
    if torch.equal(logits, given):
        return lambda out: out
    factor = float((given.double() * logits.double()).sum() / given.double().square().sum())
    if torch.allclose(logits, factor * given, rtol=CLOSE, atol=CLOSE):
        return lambda out: out * factor
    cap = config.to_dict().get("final_logit_softcapping")
    if cap and torch.allclose(logits, torch.tanh(given / cap) * cap, rtol=CLOSE, atol=CLOSE):
        return lambda out: torch.tanh(out / cap) * cap
    return None
