"""Takes second moments of a model in memory on rows: of its log-likelihood's gradients, or of its linear layers' inputs.

One row at a time, without padding: a gradient is a row's own, and no input is of a token that is not there.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spunge.data.samples import IGNORED, PROMPT_SHARE, Encoded, Samples, collate, encode, token_losses
from spunge.errors import RecipeError
from spunge.model.loading import Base
from spunge.progress import Steps
from spunge.weights.names import WHOLE


@dataclass(frozen=True)
class Taken:
    """tensors: by the checkpoint's names, float32, on the CPU; info: what is known of them (`spunge.weights.moments`)."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]


def rows_of(parts: Sequence[Samples], base: Base, rows: int, max_length: int) -> list[Encoded]:
    """Tokens of so many rows of each part, evenly spread over it. Raises RecipeError for a row without tokens."""
    coded: list[Encoded] = []
    for samples in parts:
        count = min(rows, len(samples))
        chosen = [number * len(samples) // count for number in range(count)]
        for row, text in zip(chosen, samples.texts(chosen, base.tokenizer), strict=True):
            own = encode(text, base.tokenizer, base.reach(max_length), PROMPT_SHARE)
            if not own.ids:
                raise RecipeError(f"rows: row {samples.number(row)} has no token; filter the row out")
            coded.append(own)
    return coded


def gradient_moments(
    base: Base,
    rows: Sequence[Encoded],
    names: Collection[str],
    labels: Literal["sampled", "own"],
    seed: int,
    progress: Steps,
) -> Taken:
    """Fisher's diagonal: the mean over rows of the squared gradient of the log-likelihood of a row's learned tokens.

    labels: sampled draws each of these tokens from the model, given the row's own tokens before it. names: the checkpoint's
    tensors that it is taken of.
    """
    own = base.model.state_dict(keep_vars=True)
    leaves = {name: own[name] for name, stored in base.names.items() if any(each in names for each in stored)}
    sums = {
        stored: torch.zeros(tuple(view.shape), device=view.device)
        for name, leaf in leaves.items()
        for stored, view in base.stored(name, leaf.detach()).items()
        if stored in names
    }
    generator = torch.Generator().manual_seed(seed)
    with learning(base.model, leaves.values()):
        for number, row in enumerate(rows, 1):
            likelihood = log_likelihood(base, row, generator if labels == "sampled" else None)
            gradients = torch.autograd.grad(likelihood, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                for stored, value in base.stored(name, gradient).items() if gradient is not None else ():
                    if stored in sums:
                        sums[stored] += value.float().square()
            progress(number, len(rows))
    tensors = {name: (total / len(rows)).cpu().contiguous() for name, total in sums.items()}
    norm = sum(float(each.double().square().sum()) for each in tensors.values()) ** 0.5
    return Taken(tensors, {"rows": len(rows), "norm": norm})


def log_likelihood(base: Base, row: Encoded, generator: torch.Generator | None) -> Tensor:
    """Of a row's learned tokens, or of tokens drawn in their places, in nats."""
    batch = collate([row], base.device)
    logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[0, :-1]
    labels = batch.labels[0, 1:]
    learned = labels != IGNORED
    logits, labels = logits[learned].float(), labels[learned]
    if generator is not None and len(labels):
        drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)
        labels = drawn[:, 0].to(labels.device)
    return -token_losses(logits, labels).sum()


@contextmanager
def learning(model: nn.Module, leaves: Collection[Tensor]) -> Iterator[None]:
    """Inside the block these parameters alone have gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, learned in before:
            parameter.requires_grad_(learned)


def input_moments(base: Base, rows: Sequence[Encoded], names: Collection[str], progress: Steps) -> Taken:
    """The mean over tokens of x x^T, x a linear layer's input, for each of the checkpoint's tensors that is such a layer's weight.

    Left out, and told as `averaged`: weights that several modules share (tied embeddings), tensors of other modules (norms,
    embeddings, biases, experts that are stored in one parameter), and parts of a weight that has more inputs.
    """
    layers = linear_layers(base.model)
    own = base.model.state_dict(keep_vars=True)
    axes: dict[str, int] = {}
    of: dict[str, nn.Module] = {}
    for name, stored in base.names.items():
        if (layer := layers.get(id(own[name]))) is None:
            continue
        for each in stored:
            axis = input_axis(layer, base.regions.get(each, WHOLE))
            if each in names and axis is not None:
                axes[each], of[each] = axis, layer
    sums = {id(layer): torch.zeros(inputs_of(layer), inputs_of(layer), device=base.device) for layer in of.values()}
    reached = set[int]()

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = next(iter((*given, *named.values()))).detach()
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        sums[id(layer)].addmm_(inputs.T, inputs)
        if len(inputs):
            reached.add(id(layer))

    hooks = [
        layer.register_forward_pre_hook(note, with_kwargs=True)
        for layer in {id(layer): layer for layer in of.values()}.values()
    ]
    tokens = 0
    try:
        with torch.no_grad():
            for number, row in enumerate(rows, 1):
                batch = collate([row], base.device)
                base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                tokens += len(row.ids)
                progress(number, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    means = {key: (total / tokens).cpu() for key, total in sums.items()}
    info = {
        "rows": len(rows),
        "tokens": tokens,
        "axes": axes,
        "averaged": sorted(set(names) - set(axes)),
        "silent": sorted(name for name, layer in of.items() if id(layer) not in reached),
    }
    return Taken({name: means[id(layer)] for name, layer in of.items()}, info)


def linear_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The weight's id -> the linear layer that alone has it."""
    from transformers.pytorch_utils import Conv1D

    owners = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
    kinds = (nn.Linear, Conv1D)
    layers = [module for module in model.modules() if isinstance(module, kinds) and owners[id(module.weight)] == 1]
    return {id(layer.weight): layer for layer in layers}


def inputs_of(layer: Any) -> int:
    """Numbers that a linear layer takes: transformers' Conv1D keeps its weight (inputs, outputs)."""
    return int(layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.weight.shape[0])


def input_axis(layer: Any, region: Any) -> int | None:
    """The dimension of a stored tensor along which a layer's inputs lie; None where it has not all of them, in their order."""
    order = torch.arange(inputs_of(layer))
    shape = tuple(layer.weight.shape)
    stored = region.of((order if isinstance(layer, nn.Linear) else order.unsqueeze(1)).expand(shape))
    if stored.ndim != 2:
        return None
    for axis, along in ((1, order), (0, order.unsqueeze(1))):
        if stored.shape[axis] == len(order) and bool((stored == along).all()):
            return axis
    return None
