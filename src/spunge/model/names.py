"""The model's parameter names and the names under which its checkpoint stores them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.names import WHOLE, Region, layout_of


class StoredNames(NamedTuple):
    """The model's tensor -> the checkpoint's tensors in it: two when tied and twice stored, many when experts are stacked;
    and of those that are not all of it, where they lie."""

    names: Mapping[str, tuple[str, ...]]
    regions: Mapping[str, Region]


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> StoredNames:
    """Which of the checkpoint's tensors lie where in a model that was loaded from it.

    Left out are tensors that the checkpoint lacks, and those that loading made of cut or mixed pieces.
    Raises RecipeError when nothing is left.
    """
    own = model.state_dict(keep_vars=True)
    layout = layout_of(model, checkpoint)
    names: dict[str, tuple[str, ...]] = {}
    for name, inner in layout.regions.items():
        if all(_holds(region.of(own[name].detach()), checkpoint, stored) for stored, region in inner.items()):
            names[name] = tuple(inner)
    if not names:
        raise RecipeError(
            f"{checkpoint.setting}: no tensor in {str(checkpoint.folder)!r} bears a name of the model's parameters"
        )
    flat = {stored: region for name in names for stored, region in layout.regions[name].items() if region != WHOLE}
    return StoredNames(names, flat)


def _holds(view: Tensor, checkpoint: Checkpoint, stored: str) -> bool:
    """Whether the first, the middle or the last row is the stored tensor's: transformers' tables are believed no further than
    that. (One row may differ: some architectures clear the padding token's embedding when they are loaded.)"""
    info = checkpoint.tensors[stored]
    if tuple(view.shape) != info.shape:
        return False
    if not info.shape or not info.numel:
        return torch.equal(view.cpu(), checkpoint.read(stored).to(view.dtype))
    places = {0, info.shape[0] // 2, info.shape[0] - 1}
    rows = ((view[place : place + 1], checkpoint.read(stored, slice(place, place + 1))) for place in places)
    return any(torch.equal(ours.cpu(), theirs.to(ours.dtype)) for ours, theirs in rows)
