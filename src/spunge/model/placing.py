"""Lay a model over several devices (`model.device_map`).

To judge it, through accelerate: the model is loaded into the machine's memory, and whatever changes its values does so there. Only
then is it laid over the devices: what they do not hold stays where it is and comes to the first of them for the time that it
computes. A checkpoint's weights that are computed with as they are stored stay in its files until they are read.

To train some of its blocks, one by one: each block stays on its device, and what it is called with comes there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spunge.errors import RecipeError
from spunge.model.architecture import find_blocks
from spunge.model.loading import Base
from spunge.recipe.model import DeviceMap

ENDLESS = 1 << 60  # bytes: accelerate is to leave nothing on the disk, where a value could not be laid over another


@contextmanager
def placed(base: Base) -> Iterator[None]:
    """Inside the block, the model lies on the devices of its map; after it, its tensors are the very ones that they were before.

    Its values may not be changed meanwhile. Nothing where it has no map.
    """
    if base.device_map is None:
        yield
        return
    with dispatched(base.model, devices_of(base.model, base.device_map), base.device):
        yield


def devices_of(model: Any, device_map: DeviceMap) -> dict[str, int | str]:
    """Module -> the number of its GPU, or `cpu`: no block is cut in two. Raises RecipeError for a GPU that is not there."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    count = torch.cuda.device_count()
    if isinstance(device_map, dict) and (missing := sorted(set(device_map) - set(range(count)))):
        raise RecipeError(f"model.device_map: {missing[0]}: there are {count} GPUs here, counted from 0; leave it out")
    whole = sorted({type(block).__name__ for block in find_blocks(model)} | set(model._no_split_modules or ()))
    room: dict[int | str, Any]
    if isinstance(device_map, dict):
        room = get_max_memory({**device_map})
    else:
        room = get_balanced_memory(model, no_split_module_classes=whole)
    devices: dict[str, int | str] = infer_auto_device_map(
        model, max_memory={**room, "cpu": ENDLESS}, no_split_module_classes=whole
    )
    return devices


@contextmanager
def dispatched(model: Any, devices: Mapping[str, int | str], main: torch.device) -> Iterator[None]:
    """Inside the block, each module lies on its device. main: where what is on `cpu` or `disk` computes; its values come from the
    machine's memory each time."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    held = {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        dispatch_model(
            model,
            dict(devices),
            main_device=main.index or 0 if main.type == "cuda" else main,
            state_dict=held,
            offload_index={},
            skip_keys=model._skip_keys_device_placement,
            force_hooks=True,
        )
        yield
    finally:
        remove_hook_from_submodules(model)
        for name in ("to", "cuda", "hf_device_map"):  # what dispatch_model sets
            vars(model).pop(name, None)
        for module, parameters, buffers in before:
            _put_back(module, parameters, buffers)


def laid_out(base: Base) -> Base:
    """A base whose first blocks are to be trained, on the devices of its map for good; itself where it has none.

    Its `device` is then that of the embeddings. Raises RecipeError where the GPUs do not hold all of it.
    """
    if base.device_map is None:
        return base
    devices = devices_of(base.model, base.device_map)
    if "cpu" in devices.values():
        count = len(find_blocks(base.model))
        raise RecipeError(
            f"model.device_map: {base.device_map}: the GPUs do not hold the {count} blocks that training runs through, and it "
            "takes none from the machine's memory; give more GPUs or memory, or a lower unlearn.layer"
        )
    home = settle_on(base.model, {name: torch.device("cuda", int(number)) for name, number in devices.items()})
    return replace(base, device=home, device_map=None)


def settle_on(model: Any, devices: Mapping[str, torch.device]) -> torch.device:
    """Have each module, or tensor of the model's own, on its device; what a module is called with comes there. -> the embeddings'
    device, where the model itself computes.

    A tensor that several modules share goes where the first of them is.
    """
    modules, moved = dict(model.named_modules()), set[int]()
    embeddings = model.get_input_embeddings()
    home = next(where for name, where in devices.items() if name in modules and embeddings in modules[name].modules())
    for name, given in devices.items():
        own = name not in modules  # a tensor of the model's own
        where = home if own else given
        for module in [modules[name.rpartition(".")[0]]] if own else modules[name].modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in moved:
                    parameter.data = parameter.data.to(where)
                    moved.add(id(parameter))
            module._buffers.update({key: each.to(where) for key, each in module._buffers.items() if each is not None})
        if not own and len(set(devices.values())) > 1:
            modules[name].register_forward_pre_hook(_bringing(where), with_kwargs=True)
    return home


def _bringing(where: torch.device) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that brings what a module is called with to its device."""
    from accelerate.utils import send_to_device

    return lambda _module, given, named: (send_to_device(given, where), send_to_device(named, where))


def _put_back(module: nn.Module, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    """The very tensors: those that several modules share are one again."""
    module._parameters.update(parameters)
    module._buffers.update(buffers)
