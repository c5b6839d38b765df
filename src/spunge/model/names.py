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
    """Whether the first and the last row are the stored tensor's: transformers' tables are believed no further than that."""
    info = checkpoint.tensors[stored]
    if tuple(view.shape) != info.shape:
        return False
    ends = [None] if not info.shape else [slice(0, 1), slice(info.shape[0] - 1, info.shape[0])]
    rows = ((view if rows is None else view[rows], checkpoint.read(stored, rows)) for rows in ends)
    return all(torch.equal(ours.cpu(), theirs.to(ours.dtype)) for ours, theirs in rows)
