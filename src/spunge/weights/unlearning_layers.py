"""Unlearning layers (Chen & Yang 2023, arXiv 2310.20150): a bottleneck after the feed-forward network of every block.

    h -> h + up act(down h)

Neither projection has a bias. A model that has them is the architecture that it was, under a name of its own, so that no program
takes it for one without them. This file lies beside such a model's weights too, where transformers reads it:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SUFFIX = "_with_unlearning_layers"  # of the model_type
SETTING = "unlearning_layers"  # what config.json calls their size and activation
INSIDE = "unlearning"  # what a feed-forward network calls its layer
# Architectures whose blocks have a feed-forward network called `mlp` that gives one tensor, to be added to the residual stream,
# and whose checkpoints are stored as they are loaded.
KINDS = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "granite", "cohere", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "gpt2", "starcoder2"),
)


class UnlearningLayer(nn.Module):
    """Adds what goes through a narrow layer. As it is made it adds nothing: `up` is 0."""

    def __init__(self, width: int, size: int, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.down = nn.Linear(width, size, bias=False)
        self.act = ACT2FN[activation]
        self.up = nn.Linear(size, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., width) -> (..., width)
        added: Tensor = hidden + self.up(self.act(self.down(hidden)))
        return added


class Classes(NamedTuple):
    """Of an architecture with unlearning layers."""

    config: Any
    trunk: Any  # without the output layer
    model: Any


@cache
def classes_of(kind: str) -> Classes:
    """The classes of an architecture (`llama`) with unlearning layers, which transformers knows from then on."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
    )

    plain = CONFIG_MAPPING[kind]
    own = {"model_type": f"{kind}{SUFFIX}", "__module__": __name__}
    config: Any = type(f"{plain.__name__}WithUnlearningLayers", (plain,), own)
    trunk, model = (_with_layers(each[plain], config) for each in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING))
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, trunk, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return Classes(config, trunk, model)


def _with_layers(plain: Any, config: Any) -> Any:
    def begin(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        _insert(self, config)

    own = {"__init__": begin, "config_class": config, "__module__": __name__}
    return type(f"{plain.__name__}WithUnlearningLayers", (plain,), own)


def _insert(model: nn.Module, config: Any) -> None:
    """Give the feed-forward network of every block its layer."""
    said = vars(config)[SETTING]
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next(each for each in lists if len(each) == config.num_hidden_layers)
    for block in blocks:
        inner = block.get_submodule("mlp")
        inner.add_module(INSIDE, UnlearningLayer(config.hidden_size, said["size"], said["activation"]))
        inner.register_forward_hook(_through)


def _through(inner: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    hidden: Tensor = inner.get_submodule(INSIDE)(output)
    return hidden


def first_down(size: int, width: int, generator: torch.Generator) -> Tensor:  # (size, width) float32
    """What a layer's down-projection begins with: normal, of deviation 0.02."""
    return torch.randn(size, width, generator=generator) * 0.02
