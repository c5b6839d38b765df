"""The model's parameter names and the names under which its checkpoint stores them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.names import WHOLE, Region, layout_of
from spunge.weights.packed import is_packed, unpacked


class StoredNames(NamedTuple):
    """The model's tensor -> the checkpoint's tensors in it: two when tied and twice stored, many when experts are stacked;
    and of those that are not all of it, where they lie."""

    names: Mapping[str, tuple[str, ...]]
    regions: Mapping[str, Region]


PACKED = 0.3  # a row that was packed is as near as this to the stored one, as a share of it: nf4 is at 0.1, another row at 1.4


def stored_names(model: nn.Module, checkpoint: Checkpoint, plain: nn.Module | None = None) -> StoredNames:
    """Which of the checkpoint's tensors lie where in a model that was loaded from it.

    plain: of a model whose layers are packed, the same with nothing packed; it needs no values.

    Left out are tensors that the checkpoint lacks, and those that loading made of cut or mixed pieces.
    Raises RecipeError when nothing is left.
    """
    own = model.state_dict(keep_vars=True)
    packed = {f"{path}.weight": module for path, module in model.named_modules() if is_packed(module)}
    layout = layout_of(plain or model, checkpoint)
    names: dict[str, tuple[str, ...]] = {}
    for name, inner in layout.regions.items():
        value = unpacked(packed[name]) if name in packed else own[name].detach()
        apart = PACKED if name in packed else 0.0
        if all(_holds(region.of(value), checkpoint, stored, apart) for stored, region in inner.items()):
            names[name] = tuple(inner)
    if not names:
        raise RecipeError(
            f"{checkpoint.setting}: no tensor in {str(checkpoint.folder)!r} bears a name of the model's parameters"
        )
    flat = {stored: region for name in names for stored, region in layout.regions[name].items() if region != WHOLE}
    return StoredNames(names, flat)


def _holds(view: Tensor, checkpoint: Checkpoint, stored: str, apart: float) -> bool:
    """Whether the first, the middle or the last row is the stored tensor's: transformers' tables are believed no further than
    that. (One row may differ: some architectures clear the padding token's embedding when they are loaded.)"""
    info = checkpoint.tensors[stored]
    if tuple(view.shape) != info.shape:
        return False
    if not info.shape or not info.numel:
        return torch.equal(view.cpu(), checkpoint.read(stored).to(view.dtype))
    places = {0, info.shape[0] // 2, info.shape[0] - 1}
    rows = ((view[place : place + 1], checkpoint.read(stored, slice(place, place + 1))) for place in places)
    return any(_near(ours.cpu(), theirs, apart) for ours, theirs in rows)


def _near(ours: Tensor, theirs: Tensor, apart: float) -> bool:
    if not apart:
        return torch.equal(ours, theirs.to(ours.dtype))
    return bool((ours.float() - theirs.float()).norm() <= apart * theirs.float().norm())
