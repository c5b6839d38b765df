"""The parts of any decoder-only model: its blocks and their output projections, found by structure and name."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.weights.names import text_part

# The projection that writes an MLP's result back to the residual stream, as the architectures call it.
DOWN_PROJECTIONS = (
    *("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "mlp.dense_out", "mlp.fc_out", "mlp.Wo"),
    *(
        "mlp.output_linear",
        "mlp_block.down_proj",
        "mixer.down_proj",
        "ffn.down_proj",
        "ffn.fc2",
        "ffn.2",
        "ffn.ffn.w_out",
    ),
    *("feed_forward.down_proj", "feed_forward.w2", "feed_forward.output", "feed_forward.value", "ff.layer_2"),
    *("output.dense", "lin2"),
)


# The same of a mixture of experts: all experts in one tensor, one tensor each, and the expert that every token takes.
EXPERT_PROJECTIONS = (
    "*.experts.down_proj",
    "*.experts.*.down_proj.weight",
    "*.experts.*.w2.weight",
    "*.shared_expert.down_proj.weight",
    "*.shared_experts.down_proj.weight",
)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, found by structure: the list of modules as long as the model is deep that holds most parameters."""
    depth = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    part = model.get_submodule(text_part(model))  # the blocks of an image encoder may be as many
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise RecipeError(f"model.path: no list of {depth} blocks found in {type(model).__name__}")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def in_language_part(model: Any) -> Callable[[str], bool]:
    """Which of a model's tensors, by name, are of its language tower or output layer; of a language model by itself, all.

    Raises RecipeError for a model of several parts that does not say which is the language tower.
    """
    if model.config.get_text_config() is model.config:
        return lambda name: True
    if not (tower := text_part(model)):
        raise RecipeError(
            f"model.part: language: {type(model).__name__} does not tell its language tower from its other parts; leave it out"
        )
    head = model.get_output_embeddings()
    inside = (tower, *(path for path, module in model.named_modules() if module is head))
    return lambda name: any(name.startswith(f"{path}.") for path in inside)


def blocks_named(chosen: Iterable[int], depth: int, setting: str) -> list[int]:
    """Numbers of blocks as a recipe gives them, -1 the last, each once, as numbers from 0. Raises RecipeError for a block that the
    model has not."""
    for number in chosen:
        if not -depth <= number < depth:
            raise RecipeError(f"{setting}: {number}: the model has {depth} blocks, 0 to {depth - 1}")
    return list(dict.fromkeys(number % depth for number in chosen))


def hidden_of(output: Any) -> Tensor:  # (b, t, d)
    """The hidden states in what a block, or its attention, gives."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block, or its attention, gives, with other hidden states."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


@contextmanager
def noted(model: nn.Module, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the block, the hidden states (b, t, d) that some blocks gave last, by the blocks' numbers."""
    blocks, last = find_blocks(model), dict[int, Tensor]()

    def note(number: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        last[number] = hidden_of(output)

    hooks = [blocks[number].register_forward_hook(partial(note, number)) for number in numbers]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


def down_projections(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a block's MLP output projections by their names in the block, found by name, never by position.

    One tensor in a dense block; in a mixture of experts those of all experts. Raises RecipeError where there is none.
    """
    parameters = dict(block.named_parameters())
    for name in DOWN_PROJECTIONS:
        if (weight := parameters.get(f"{name}.weight")) is not None:
            return {f"{name}.weight": weight}
    experts = {
        name: weight
        for name, weight in parameters.items()
        if any(fnmatchcase(name, pattern) for pattern in EXPERT_PROJECTIONS)
    }
    if not experts:
        raise RecipeError(
            f"unlearn.trainable: {type(block).__name__} has no MLP output projection under a known name; name the tensors that "
            "are trained (kind: tensors)"
        )
    return experts
