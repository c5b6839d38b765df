"""PEFT adapters, opened as a difference from the base: what peft's own `merge_and_unload` would change, tensor by tensor.

peft puts the adapter into the base's model without memory (the meta device): which layers are adapted, how they are scaled
and which way round they lie is its own doing. A plain LoRA layer gives its factors. It is read in the space of the weights,
scale * B @ A, never factor by factor: the mean of two A's and the mean of two B's do not multiply to the mean of the products
(Hu et al. 2021, arXiv:2106.09685). Any other layer (DoRA, LoHa, IA3 ...) is merged by peft into the base's values of that
layer alone, when they are asked for.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spunge.errors import RecipeError, suggestion
from spunge.weights.adapter_config import other_base, read_config
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.matching import Held
from spunge.weights.names import Layout, Region, layout_of, skeletons
from spunge.weights.sources import AdapterSource

WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the adapter in the model
ROOT = "base_model.model."
# What an adapter's change does not depend on.
_METADATA = ("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode")


@dataclass(frozen=True)
class Changes:
    """What an adapter changes, by the names of the model's tensors."""

    factors: dict[str, LowRank]
    added: dict[str, Tensor]  # differences that are stored as such
    replaced: dict[str, Tensor]  # values that are stored whole: `modules_to_save`, biases
    layers: dict[str, Any]  # peft's layers that merge themselves into the base's values


def open_adapter(folder: Path, base: Checkpoint, label: str) -> AdapterSource:
    """Open an adapter. Raises RecipeError for kinds and settings that are not understood, naming the field, and for an adapter
    that does not fit the base in every tensor, naming one that does not."""
    config = read_config(folder, label)
    if not (folder / WEIGHTS).exists():
        raise RecipeError(
            f"--model: {label!r} has no {WEIGHTS}; pickled adapters are not read, save it with safetensors"
        )
    stored = Checkpoint(folder)
    tensors = {key: stored.read(key) for key in stored.tensors}
    layout, changes = _fitted(folder, tensors, base, label)
    kept = {name: value for name, value in changes.replaced.items() if not _is_the_bases(name, value, layout, base)}
    changes = replace(changes, replaced=kept)
    _refuse_torn_ties(changes, layout, label)
    content = json.dumps({key: value for key, value in config.items() if key not in _METADATA}, sort_keys=True)
    digest = hashlib.sha256(content.encode() + (folder / WEIGHTS).read_bytes()).hexdigest()
    return _source(changes, layout, base, label, digest, other_base(config, base.folder, label))


def _first_line(error: BaseException) -> str:
    """Its first line that says something; torch begins with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)


def _fitted(folder: Path, tensors: Mapping[str, Tensor], base: Checkpoint, label: str) -> tuple[Layout, Changes]:
    """The adapter in the first class of model that takes all of it. Raises RecipeError naming what fits nowhere."""
    from peft import PeftConfig

    try:
        makers = skeletons(base.folder)
        models = [make() for make in makers]
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(
            f"--base: transformers builds no model from {str(base.folder)!r} ({_first_line(error)}), so that no adapter can be "
            f"fitted to it; merge {label!r} into it with peft and give that model"
        ) from None
    config = PeftConfig.from_pretrained(str(folder))
    problems: list[str] = []
    for model in models:
        layout = layout_of(model, base)
        try:
            return layout, _changes(_put_in(model, config, tensors))
        except _MisfitError as misfit:
            problems.append(str(misfit))
    raise RecipeError(f"--model: {label!r} {problems[0]}")


class _MisfitError(Exception):
    """What of an adapter does not fit a model."""


def _put_in(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """peft's model with the adapter in it. Raises _MisfitError unless every layer that the settings name has its tensors, and every
    tensor its layer."""
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    known = {name for name, _ in model.named_modules()}
    _fill_hollow(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, copy.deepcopy(config), NAME, low_cpu_mem_usage=True)
            loaded = set_peft_model_state_dict(wrapped, dict(tensors), NAME, low_cpu_mem_usage=True)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _MisfitError(_lacking(tensors, known) or f"does not fit the base: {_first_line(error)}") from None
    if loaded.unexpected_keys:
        reason = f"holds tensor {loaded.unexpected_keys[0]!r}, which its settings or the base have no layer for"
        raise _MisfitError(_lacking(tensors, known) or reason)
    empty = [name for name, parameter in wrapped.named_parameters() if parameter.is_meta]
    if empty:
        raise _MisfitError(f"holds no {empty[0].removeprefix(ROOT)!r}, which its settings call for; the file is incomplete")
    return wrapped


def _fill_hollow(model: nn.Module) -> None:
    """Let every parameter be one zero seen many times: as small as on the meta device, and peft takes it for a real one."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in hollow:
                zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                hollow[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            setattr(module, name, hollow[id(parameter)])


def _lacking(tensors: Mapping[str, Tensor], known: Collection[str]) -> str | None:
    """The first layer that the adapter has tensors for and the model lacks."""
    for key in tensors:
        module = key.removeprefix(ROOT).partition(".lora_")[0]
        if ".lora_" in key and module.removesuffix(".base_layer") not in known:
            return f"adapts {module!r}, which the base lacks{suggestion(module, known)}"
    return None


def _changes(wrapped: Any) -> Changes:
    """What the adapter that peft has put into a hollow model changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    changes = Changes({}, {}, {}, {})
    own: set[str] = set()  # names of peft's own parameters
    for path, module in wrapped.base_model.model.named_modules():
        name = path.replace(".base_layer", "").removesuffix(".token_adapter")
        if isinstance(module, BaseTunerLayer):
            _add_layer(changes, name, module)
            own.update(f"{path}.{each}" for each, _ in module.named_parameters() if not each.startswith("base_layer."))
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[NAME].named_parameters()
            changes.replaced.update({f"{name}.{each}": parameter.detach() for each, parameter in saved})
            own.update(f"{path}.{each}" for each, _ in module.named_parameters())
    for path, parameter in wrapped.base_model.model.named_parameters():
        if path not in own and not _is_hollow(parameter):
            changes.replaced[path.replace(".base_layer", "")] = parameter.detach()
    return changes


def _is_hollow(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and not any(parameter.stride())


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


def adapted_parameter(layer: Any) -> str:
    """Which of its base layer's parameters a LoRA layer of peft's adapts."""
    from peft.tuners.lora.layer import ParamWrapper

    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"


def factors_of(layer: Any, name: str = NAME) -> LowRank | None:
    """What a LoRA layer of peft's adds to its base layer; None where it is no product of two factors (DoRA, convolutions)."""
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    if type(layer) not in (Embedding, Linear, ParamWrapper) or name in layer.lora_variant:
        return None
    scale = float(layer.scaling[name])
    if type(layer) is Embedding:
        return LowRank(layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach(), scale, True)
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    if type(layer) is Linear or layer.get_param().ndim == 2:
        return LowRank(a, b, scale, bool(layer.fan_in_fan_out))
    # peft lays the experts' factors side by side: (experts * r, in), and (out, r * experts) with the experts innermost.
    experts = layer.num_experts
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return LowRank(a, b, scale, not layer._did_swap_in_out_features)


def _is_the_bases(name: str, value: Tensor, layout: Layout, base: Checkpoint) -> bool:
    """Whether a value that the adapter stores whole is the base's own: peft stores adapted embeddings a second time."""
    if layout.shapes.get(name) != tuple(value.shape) or layout.aliases[name] not in layout.regions:
        return False
    return torch.equal(value.float(), _base_value(name, layout, base))


def _base_value(name: str, layout: Layout, base: Checkpoint) -> Tensor:
    """A tensor of the model, from the base's checkpoint, in float32."""
    pieces = layout.regions[layout.aliases[name]]
    held = Held(tuple(pieces.items()), layout.shapes[name])
    return held.of({stored: base.read(stored) for stored in pieces}).float()


def _refuse_torn_ties(changes: Changes, layout: Layout, label: str) -> None:
    """Raises RecipeError where one of two tied tensors is changed alone, or both in other ways: the base stores one for both."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    tied: dict[str, list[str]] = {}
    for name, first in layout.aliases.items():
        tied.setdefault(first, []).append(name)
    for name in [*changes.factors, *changes.layers, *changes.replaced]:
        group = tied.get(layout.aliases.get(name, name), [name])
        values = [changes.replaced[each] for each in group if each in changes.replaced]
        alike = len(values) == len(group) and all(torch.equal(value, values[0]) for value in values)
        shared = isinstance(changes.layers.get(name), TrainableTokensLayer)
        if len(group) > 1 and not alike and not shared:
            others = ", ".join(repr(each) for each in group if each != name)
            raise RecipeError(
                f"--model: {label!r} changes {name!r}, which the base ties to {others}: one stored tensor cannot hold both; "
                "merge it with peft, which unties them, and give that model with a base that has them apart"
            )


def _source(
    changes: Changes, layout: Layout, base: Checkpoint, label: str, digest: str, notes: list[str]
) -> AdapterSource:
    """The changes by the base's names. Raises RecipeError where the base stores no tensor that holds a change as it is."""
    source = AdapterSource(label, digest, {}, {}, {}, {}, notes)
    for name, factors in changes.factors.items():
        if factors.shape != layout.shapes.get(name):
            raise RecipeError(
                f"--model: {label!r} adapts {name!r} of shape {list(factors.shape)}, the base's is {layout.shapes.get(name)}"
            )
        source.factors.update({stored: factors.part(region) for stored, region in _stored(name, layout, label).items()})
    for name, value in changes.replaced.items():
        if name not in changes.layers:
            inner = _stored(name, layout, label)
            source.replaced.update({stored: region.of(value) for stored, region in inner.items()})
    for name in [*changes.layers, *changes.added]:
        for stored, region in _stored(name, layout, label).items():
            source.shapes[stored] = base.tensors[stored].shape
            source.merged[stored] = partial(_difference, name, region, changes, layout, base)
    return source


def _stored(name: str, layout: Layout, label: str) -> Mapping[str, Region]:
    pieces = layout.regions.get(layout.aliases.get(name, name))
    if pieces is None:
        raise RecipeError(
            f"--model: {label!r} changes {name!r}, which is no tensor of the base's files, nor made of whole ones; merge it "
            "with peft and give that model"
        )
    return pieces


def _difference(name: str, region: Region, changes: Changes, layout: Layout, base: Checkpoint) -> Tensor:
    """What peft's layer makes of the base's values of one tensor, less these values; a region of it, float32."""
    if name in changes.added:
        return region.of(changes.added[name].float())
    layer, parent = changes.layers[name], name.rpartition(".")[0]
    before = _base_value(name, layout, base)
    inside = layer.get_base_layer()
    hollow = dict(inside.named_parameters(recurse=False))
    with torch.no_grad():
        for each in hollow:
            value = changes.replaced.get(f"{parent}.{each}")
            value = _base_value(f"{parent}.{each}", layout, base) if value is None else value.float()
            setattr(inside, each, nn.Parameter(value.clone(), requires_grad=False))
        layer.merge(adapter_names=[NAME])
        after = getattr(inside, name.rpartition(".")[2]).detach()
        layer.merged_adapters.clear()
        for each, parameter in hollow.items():
            setattr(inside, each, parameter)
    return region.of(after - before)
