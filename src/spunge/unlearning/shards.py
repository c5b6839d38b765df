"""A model of which each process holds a share: FSDP2 of torch (Zhao et al. 2023, arXiv 2304.11277), block by block.

Each parameter is cut along its first dimension. A block's parameters are whole while it computes, and the embeddings, the last norm
and the output layer from the model's forward pass to the end of the backward pass.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.model.architecture import find_blocks
from spunge.model.loading import Base
from spunge.model.ranks import Ranks


class Share(nn.Parameter):
    """A process's own part of a parameter. reached: whether its gradient holds one that this process's loss has for the parameter;
    it is zero else, since the others may have one."""

    reached: bool = False


def shard(model: Any, base: Base) -> dict[str, Share]:
    """Leave each process its share of a model's parameters, those that are trained in float32.

    model: what will be called, the base's model or peft's wrapper of it. Returns this process's shares of the trained parameters by
    their names in the model: (n / processes, ..) each. Gradients arrive there, as their mean over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = list(find_blocks(base.model))
    _refuse_tied(model, base, blocks)
    mesh = init_device_mesh(base.device.type, (base.ranks.count,))
    # As under autocast, a block's weights are held in the model's dtype for the backward pass, and what enters it is as it is.
    half = None if base.dtype == torch.float32 else base.dtype
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        masters = _widened(block)
        fully_shard(block, mesh=mesh, mp_policy=policy if masters else MixedPrecisionPolicy(cast_forward_inputs=False))
    _widened(model)
    fully_shard(
        model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
    ).set_reduce_scatter_unused_params(True)
    met: set[str] = set()  # names of parameters that a gradient was computed of since their shares were told
    _noted(model, "", met)
    for name, module in model.named_modules():
        if module in blocks:
            _noted(module, f"{name}.", met)
    return {
        name: _share(parameter, name, met) for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _noted(module: Any, prefix: str, met: set[str]) -> None:
    """Have `met` tell which of a module's own parameters a gradient is computed of, once they were whole for the first time."""
    from torch.distributed.tensor import DTensor

    def note(_module: Any, _inputs: Any) -> None:
        first.remove()
        for name, parameter in module.named_parameters(prefix.removesuffix(".")):
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: met.add(name))

    first = module.register_forward_pre_hook(note)  # after FSDP's own


def _widened(module: nn.Module) -> bool:
    """Let the trained parameters that are whole be float32. Whether some were narrower."""
    from torch.distributed.tensor import DTensor

    narrow = [each for each in module.parameters() if each.requires_grad and not isinstance(each, DTensor)]
    narrow = [each for each in narrow if each.dtype != torch.float32]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    return bool(narrow)


def _share(parameter: Any, name: str, met: set[str]) -> Share:
    """The process's own part of a parameter, of the same storage. The part's gradient is put there as soon as it is known."""
    own = Share(parameter.to_local().detach())

    def hand_over(whole: Any) -> None:
        gradient = whole.grad.to_local()
        own.reached = name in met or (own.grad is not None and own.reached)
        own.grad = gradient if own.grad is None else own.grad.add_(gradient)
        met.discard(name)
        whole.grad = None

    parameter.register_post_accumulate_grad_hook(hand_over)
    return own


def drop_unreached(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Leave shares without a gradient that no process's loss reaches, as one process has them: an optimizer then skips them, its
    weight decay and moments too. All processes call it together."""
    shares = [each for each in parameters if isinstance(each, Share)]
    for share, reached in zip(shares, ranks.means([share.reached for share in shares]), strict=True):
        if not reached:
            share.grad = None


def _refuse_tied(model: nn.Module, base: Base, blocks: list[nn.Module]) -> None:
    """Raises RecipeError where a block shares a parameter with another, or with what is no block."""
    inside = Counter(id(each) for block in blocks for each in set(block.parameters()))
    held = {id(module) for block in blocks for module in block.modules()}
    outside = {id(each) for module in model.modules() if id(module) not in held for each in module._parameters.values()}
    if any(count > 1 or each in outside for each, count in inside.items()):
        raise RecipeError(
            f"execution.kind: sharded: blocks of {type(base.model).__name__} share parameters, and cannot be shared out; "
            "set it to here or processes"
        )


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the block, the trained parameters of a module and its parts are whole, in every process; nothing where they are."""
    from torch.distributed.tensor import DTensor

    shares: list[tuple[nn.Module, str, Any]] = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter.requires_grad and isinstance(parameter.data, DTensor)
    ]
    for part, name, parameter in shares:
        part._parameters[name] = nn.Parameter(parameter.full_tensor().detach(), requires_grad=False)
    try:
        yield
    finally:
        for part, name, parameter in shares:
            part._parameters[name] = parameter


def gathered(own: Tensor, parameter: Any) -> Tensor:
    """The whole tensor, in every process, of which `own` is this one's part, cut as a parameter is."""
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    joined: Tensor = spread.full_tensor()
    return joined


@contextmanager
def swapped(model: Any, shares: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, shares of a sharded model's parameters hold other values. All processes enter and leave it together."""
    from torch.distributed.tensor import DTensor

    outer = [each for module in model.modules() for each in module._parameters.values() if each is not None]
    was_whole = not all(isinstance(each, DTensor) for each in outer)  # between a forward pass and its backward pass
    held = {name: share.detach().clone() for name, share in shares.items()}
    model.reshard()
    _fill(shares, values)
    try:
        yield
    finally:
        model.reshard()
        _fill(shares, held)
        if was_whole:
            model.unshard()


def _fill(shares: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, share in shares.items():
            share.copy_(values[name])
