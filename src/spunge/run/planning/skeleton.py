"""A model without values: its shapes from a configuration, what is trained of it, and what calls of it take."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.model.architecture import down_projections, find_blocks
from spunge.model.loading import Base, class_of, cut
from spunge.model.packing import hollow
from spunge.model.recalled import JsonT, recalled
from spunge.recipe.model import ModelPart
from spunge.recipe.training import Everything, LoRA, Selected
from spunge.run.planning.tracing import Traced, Tracing, between
from spunge.unlearning.calls import Call
from spunge.unlearning.forms import FORMS
from spunge.unlearning.quick.products import SPARSE
from spunge.unlearning.scored import Scored, places_at_once
from spunge.unlearning.targets import find_targets
from spunge.unlearning.trained import training, training_mode, training_tensors

LOW, HIGH = 2, 4  # blocks of the models that are followed; each block more takes half of what they are apart


class Texts(NamedTuple):
    """What a call is given."""

    rows: int
    tokens: int  # of each row, padded
    scored: int  # places of a row whose next token is scored


@dataclass(frozen=True)
class Skeleton:
    """A configuration, and how its model is held while it trains."""

    config: Any
    dtype: torch.dtype  # of the arithmetic
    trust: bool = False
    recomputed: bool = False  # model.checkpoint_activations
    gpu: bool = False
    part: ModelPart | None = None  # model.part
    shared: bool = False  # each process has a share of it, and blocks are put together in the dtype of the arithmetic

    @property
    def depth(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def hidden(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    def model(self, blocks: int | None = None) -> Any:
        """On the meta device: whole, or so many blocks of it."""
        config = self.config if blocks is None else cut(self.config, blocks)
        return hollow(class_of(config), config, self.trust).to(self.dtype)

    def recalled(self, about: list[Any], find: Callable[[], JsonT]) -> JsonT:
        """What `find` gives for this model, or gave in an earlier command. Of a model with code of its own nothing is kept: that
        may change."""
        if self.trust:
            return find()
        config = self.config
        held = [
            str(self.dtype),
            self.recomputed,
            self.gpu,
            self.shared,
            self.part,
            torch.backends.cpu.get_cpu_capability(),
        ]
        described = [type(config).__name__, config.to_json_string(use_diff=False), str(config._attn_implementation)]
        return recalled(["model", described, held, about], find)

    def held_entries(self, blocks: int | None = None) -> list[int]:
        """Of the model in memory, whole, or so many blocks without an output layer; those of the blocks' matrices; and all of the
        blocks."""
        model = self.model(blocks)
        head, inside = model.get_output_embeddings(), list(find_blocks(model).parameters())
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        entries = sum(parameter.numel() for parameter in model.parameters())
        if blocks is not None and head is not None and not tied:
            entries -= head.weight.numel()
        matrices = sum(weight.numel() for weight in inside if weight.ndim == 2)
        return [entries, matrices, sum(each.numel() for each in inside)]

    def entries(self) -> int:
        """Of all its parameters."""
        return sum(parameter.numel() for parameter in self.model().parameters())

    def trained_entries(self, what: LoRA | Selected | Everything | None, blocks: int | None = None) -> int:
        """Of what is trained: LoRA's factors, the chosen tensors, or all; None: the output projections of so many blocks' MLPs."""
        model = self.model(blocks)
        if isinstance(what, LoRA):
            base = _base(self, model)
            targets = find_targets(base, what.targets, _dropped(what))
            names = [*(f"{path}.weight" for path in targets.layers), *targets.parameters]
            return sum(_factors(model.get_parameter(name).shape, what.rank) for name in names)
        with _training(self, model, what) as model:
            return sum(each.numel() for each in model.parameters() if each.requires_grad)


def stand_in(skeleton: Skeleton) -> Skeleton:
    """A Llama of the same sizes, for an architecture whose code looks at values. Of a mixture, a token's own experts."""
    from transformers import LlamaConfig

    known = {name: value for name, value in skeleton.config.get_text_config().to_dict().items() if value is not None}
    hidden, heads = skeleton.hidden, int(known.get("num_attention_heads") or max(1, skeleton.hidden // 64))
    inner = int(known.get("moe_intermediate_size") or known.get("intermediate_size") or 4 * hidden)
    config = LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=hidden,
        intermediate_size=inner * int(known.get("num_experts_per_tok") or 1),
        num_hidden_layers=skeleton.depth,
        num_attention_heads=heads,
        num_key_value_heads=int(known.get("num_key_value_heads") or heads),
        head_dim=int(known.get("head_dim") or hidden // heads),
        tie_word_embeddings=bool(known.get("tie_word_embeddings", False)),
    )
    return replace(skeleton, config=config, trust=False)


def followed(skeleton: Skeleton, what: LoRA | Selected | Everything | None, call: Call, texts: Texts) -> Traced:
    """What one call takes, and the gradient of its loss. Raises what the architecture raises where it looks at values."""
    blocks = skeleton.depth if call.blocks is None else call.blocks
    if blocks <= HIGH:
        return _followed(skeleton, what, call, texts, blocks)
    low, high = (_followed(skeleton, what, call, texts, count) for count in (LOW, HIGH))
    return between(low, high, (LOW, HIGH), blocks)


def _followed(
    skeleton: Skeleton, what: LoRA | Selected | Everything | None, call: Call, texts: Texts, blocks: int
) -> Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = skeleton.model(blocks)
    # A model that is judged, or that writes: nothing of it is trained.
    only_read = what is None and call.blocks is None and not call.gradient
    held = nullcontext(_base(skeleton, made).model) if only_read else _training(skeleton, made, what)
    with held as model, FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(model, skeleton)
        ids = torch.zeros(texts.rows * call.samples, texts.tokens, dtype=torch.long)
        labels = torch.zeros(len(ids) * (texts.tokens - 1 if call.everywhere else texts.scored), dtype=torch.long)
        other = _reference(model, call, labels, skeleton)
        gradient = torch.enable_grad() if call.gradient else torch.no_grad()
        enabled = skeleton.dtype != torch.float32
        with Tracing() as tracing, training_mode(model):
            with gradient, torch.autocast("cpu", skeleton.dtype, enabled=enabled):
                loss = _loss(model, call, ids, labels, other, skeleton)
            tracing.mark()
            if call.gradient:
                torch.autograd.backward(loss)
            del loss
        traced: Traced = tracing.traced
        return traced


def _base(skeleton: Skeleton, model: Any) -> Base:
    names = {name: (name,) for name, _ in model.named_parameters()}
    model.eval().requires_grad_(False)
    return Base(
        model,
        None,
        Path(),
        torch.device("cpu"),
        skeleton.dtype,
        names,
        skeleton.depth,
        checkpoint_activations=skeleton.recomputed,
        part=skeleton.part,
    )


def _dropped(what: LoRA) -> float:
    """The share of what factors read that is dropped. Which places depends on values: a small one costs little: left out."""
    return 0.0 if what.dropout <= SPARSE else what.dropout


def _factors(shape: torch.Size, rank: int) -> int:
    """Entries of the two factors of a matrix (m, n), or of each of some matrices (e, m, n)."""
    *count, rows, columns = shape
    return rank * math.prod(count) * (rows + columns)


@contextmanager
def _training(skeleton: Skeleton, model: Any, what: LoRA | Selected | Everything | None) -> Iterator[Any]:
    """The model with what is trained of it in float32, in the forms that training computes in."""
    base = _base(skeleton, model)
    if what is None:
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        chosen = [own[id(weight)] for block in find_blocks(model) for weight in down_projections(block).values()]
        with training_tensors(base, chosen) as trained:
            yield trained.model
        return
    if isinstance(what, LoRA):
        what = what.model_copy(update={"dropout": _dropped(what)})
    with training(base, what, 0) as trained:
        yield trained.model


def _without_values(model: Any, skeleton: Skeleton) -> None:
    """Put tensors in place of the model's that have a device and no memory, and gradients beside those that are trained."""
    put_together = {id(each) for each in find_blocks(model).parameters()} if skeleton.shared else set()
    put: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in put:
                dtype = skeleton.dtype if id(parameter) in put_together else parameter.dtype
                new = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                new.grad = torch.empty_like(new) if new.requires_grad else None
                put[id(parameter)] = new
            module._parameters[name] = put[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _reference(model: Any, call: Call, labels: Tensor, skeleton: Skeleton) -> Scored | None:
    """The base's outputs that this call's are compared with: states that were computed before."""
    if not call.beside:
        return None
    states = torch.empty(len(labels), skeleton.hidden, dtype=skeleton.dtype)
    return _scored(model, states, labels, skeleton)


def _loss(model: Any, call: Call, ids: Tensor, labels: Tensor, other: Scored | None, skeleton: Skeleton) -> Tensor:
    if call.blocks is not None:
        states = _hidden_states(model, ids)
        return (states.float() - torch.empty(states.shape)).square().mean(-1).sum()
    scored = _scored(model, _states(model, ids, len(labels)), labels, skeleton)
    if other is None:
        return scored.losses().sum()

    def base(places: slice) -> Tensor:
        with torch.no_grad():
            return other.log_probabilities(places)

    return scored.divergences(base).sum()


def _hidden_states(model: Any, ids: Tensor) -> Tensor:
    """After the last block (b, t, d)."""
    body = model.get_base_model() if "peft_config" in vars(model) else model
    states: Tensor = body.base_model(input_ids=ids, use_cache=False)[0]
    return states


def _states(model: Any, ids: Tensor, count: int) -> Tensor:
    """What the output layer reads at so many places (n, d)."""
    read: list[Tensor] = []

    def take(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(inputs[0].flatten(0, 1)[:count].clone())
        return (inputs[0][:, :0], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return read[0]


def _scored(model: Any, states: Tensor, labels: Tensor, skeleton: Skeleton) -> Scored:
    head = model.get_output_embeddings()
    trained = any(parameter.requires_grad for parameter in head.parameters())
    vocabulary, width = head.weight.shape
    piece = places_at_once(FORMS["cuda" if skeleton.gpu else "cpu"], vocabulary, width, trained)
    rows = torch.zeros_like(labels)
    return Scored(states, labels, rows, 1, lambda each: head(each).float(), piece, trained)
