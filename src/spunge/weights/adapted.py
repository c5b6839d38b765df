"""What an adapter changes in the model that peft has put it into: factors, values stored whole, and layers that peft merges."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.weights.delta import LowRank
from spunge.weights.importing import import_peft
from spunge.weights.packed import is_packed, is_turned

NAME = "default"  # peft's name of the adapter in the model
_ZERO = torch.zeros(())


@dataclass(frozen=True)
class Changes:
    """What an adapter changes, by the names of the model's tensors."""

    factors: dict[str, LowRank]
    added: dict[str, Tensor]  # differences that are stored as such
    replaced: dict[str, Tensor]  # values that are stored whole: `modules_to_save`, biases
    layers: dict[str, Any]  # peft's layers that merge themselves into the base's values


def changes_of(wrapped: Any) -> Changes:
    """What the adapter that peft has put into a hollow model changes; nothing where there is no such model."""
    import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    changes = Changes({}, {}, {}, {})
    if wrapped is None:
        return changes
    own: set[str] = set()  # names of peft's own parameters
    for path, module in wrapped.base_model.model.named_modules():
        name = path.replace(".base_layer", "").removesuffix(".token_adapter")
        if isinstance(module, BaseTunerLayer):
            _add_layer(changes, name, module)
            own.update(f"{path}.{each}" for each, _ in module.named_parameters() if not each.startswith("base_layer."))
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[NAME].state_dict()
            changes.replaced.update({f"{name}.{each}": value for each, value in saved.items()})
            own.update(f"{path}.{each}" for each, _ in module.named_parameters())
    for path, parameter in wrapped.base_model.model.named_parameters():
        if path not in own and not _is_hollow(parameter):
            changes.replaced[path.replace(".base_layer", "")] = parameter.detach()
    return changes


def fill_hollow(model: nn.Module) -> None:
    """Let every parameter be one zero seen many times: as small as on the meta device, but peft takes it for a real one."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in hollow:
                hollow[id(parameter)] = nn.Parameter(_ZERO.expand(parameter.shape), requires_grad=False)
            setattr(module, name, hollow[id(parameter)])


def _is_hollow(parameter: Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == _ZERO.untyped_storage().data_ptr()


def _add_layer(changes: Changes, name: str, layer: Any) -> None:
    """A layer of peft's: its factors where it is a plain LoRA, else itself, to merge when its values are asked for."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if isinstance(layer, TrainableTokensLayer):
        if layer.tied_adapter is None:
            changes.layers[f"{name}.weight"] = layer
    elif not isinstance(layer, LoraLayer):
        changes.layers.update({f"{name}.{each}": layer for each, _ in layer.get_base_layer().named_parameters()})
    elif (factors := factors_of(layer)) is not None:
        changes.factors[f"{name}.{adapted_parameter(layer)}"] = factors
    else:
        changes.layers[f"{name}.weight"] = layer
    if isinstance(layer, LoraLayer) and layer.lora_bias.get(NAME):
        changes.added[f"{name}.bias"] = (layer.lora_B[NAME].bias * layer.scaling[NAME]).detach()


def is_plain_layer(module: nn.Module) -> bool:
    """Whether peft can put its layer in a module's place: a linear layer or embeddings that give what such layers give.

    The routers of some mixtures are linear layers that give a tuple: their weight can be adapted as a parameter alone.
    """
    from transformers.pytorch_utils import Conv1D

    if is_packed(module):
        return True
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        weight = module.weight
        try:
            with torch.no_grad():
                given = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
        except Exception:  # a class of its own, that wants something else
            return False
        return isinstance(given, Tensor) and given.shape == (1, module.out_features)
    return isinstance(module, nn.Linear | nn.Embedding) or type(module) is Conv1D


class Targets(NamedTuple):
    """What peft is told to adapt, by names in the model."""

    layers: list[str]  # modules, for which it puts a layer of its own
    parameters: list[str]  # tensors, which it adapts in place


def targets_of(model: Any, weights: Iterable[str]) -> Targets:
    """How peft is told to adapt some tensors of a model: the layers that they are the weights of, else the tensors themselves.

    Of the mixtures that it knows, peft takes a layer called `gate_proj` for the experts' that older versions of transformers
    called so, also where it is a shared expert's or a dense block's: such weights are adapted as tensors.
    """
    targets = Targets([], [])
    for name in weights:
        path, _, last = name.rpartition(".")
        layer = last == "weight" and is_plain_layer(model.get_submodule(path))
        if layer and path.rpartition(".")[2] not in taken_for_experts(model):
            targets.layers.append(path)
        else:
            targets.parameters.append(name)
    return targets


def taken_for_experts(model: Any) -> frozenset[str]:
    """Names of layers that peft takes for those of experts in a model of this kind."""
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = model.config.model_type
    if get_checkpoint_conversion_mapping(kind) is None:
        return frozenset()
    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(family, ()))


def adapted_parameter(layer: Any) -> str:
    """Which of its base layer's parameters a LoRA layer of peft's adapts."""
    from peft.tuners.lora.layer import ParamWrapper

    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"


def factors_of(layer: Any, name: str = NAME) -> LowRank | None:
    """What a LoRA layer of peft's adds to its base layer; None where it is no product of two factors (DoRA, convolutions)."""
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    inside = layer.get_base_layer()
    packed = is_packed(inside)
    if not (packed or type(layer) in (Embedding, Linear, ParamWrapper)) or name in layer.lora_variant:
        return None
    scale = float(layer.scaling[name])
    if type(layer) is Embedding:
        return LowRank(layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach(), scale, True)
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    if packed:
        return LowRank(a, b, scale, is_turned(inside))
    if type(layer) is Linear or layer.get_param().ndim == 2:
        return LowRank(a, b, scale, bool(layer.fan_in_fan_out))
    # peft lays the experts' factors side by side: (experts * r, in), and (out, r * experts) with the experts innermost.
    experts = layer.num_experts
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return LowRank(a, b, scale, not layer._did_swap_in_out_features)


def set_factors(layer: Any, a: Tensor, b: Tensor) -> None:
    """Let a LoRA layer of peft's add b @ a to its parameter, as that lies: a (..., r, columns), b (..., rows, r), for experts in
    one tensor with a first dimension for them. The opposite of `factors_of`, at a scale of 1.
    """
    from peft.tuners.lora.layer import Embedding, ParamWrapper

    experts = isinstance(layer, ParamWrapper) and layer.get_param().ndim == 3
    turned = isinstance(layer, Embedding) or (not layer._did_swap_in_out_features if experts else layer.fan_in_fan_out)
    if turned:
        a, b = b.transpose(-1, -2), a.transpose(-1, -2)
    if experts:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    pair = [nn.Parameter(each.contiguous(), requires_grad=False) for each in (a, b)]
    if isinstance(layer, Embedding):
        layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME] = pair
    else:
        layer.lora_A[NAME].weight, layer.lora_B[NAME].weight = pair


def merged_by(layer: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What peft's layer makes of its base layer's parameters (by their names in it) when it merges itself into them."""
    inside = layer.get_base_layer()
    hollow = dict(inside.named_parameters(recurse=False))
    with torch.no_grad():
        for name, value in values.items():
            setattr(inside, name, nn.Parameter(value.clone(), requires_grad=False))
        layer.merge(adapter_names=[NAME])
        merged = {name: getattr(inside, name).detach() for name in values}
        layer.merged_adapters.clear()
        for name, parameter in hollow.items():
            setattr(inside, name, parameter)
    return merged
