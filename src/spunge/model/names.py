"""The model's parameter names and the names under which its checkpoint stores them."""

from collections.abc import Mapping

import torch
from torch import nn

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint


def checkpoint_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The model's parameter names -> the checkpoint's. Some differ by the base model's prefix (GPT-2, OPT; a cut model).

    A tied tensor that the checkpoint stores twice has two names. Parameters the checkpoint lacks are left out.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    names = {}
    for name, parameter in model.named_parameters():
        candidates = dict.fromkeys(
            spelling
            for alias in aliases[id(parameter)]
            for spelling in (alias, alias.removeprefix(prefix), prefix + alias)
        )
        stored = tuple(spelling for spelling in candidates if spelling in checkpoint.tensors)
        if stored:
            names[name] = stored
    names.update(_names_by_content(model, checkpoint, names))
    if not names:
        raise RecipeError(f"model.path: no tensor in {str(checkpoint.folder)!r} bears a name of the model's parameters")
    return names


def _names_by_content(
    model: nn.Module, checkpoint: Checkpoint, known: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Names for parameters that transformers renamed on loading (GPT-NeoX's embed_out): the one unclaimed tensor that
    holds the same values."""
    claimed = {spelling for stored in known.values() for spelling in stored}
    unclaimed = [info for info in checkpoint.tensors.values() if info.name not in claimed]
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        if name in known:
            continue
        same = [
            info.name
            for info in unclaimed
            if info.shape == tuple(parameter.shape)
            and torch.equal(checkpoint.read(info.name).to(parameter.dtype), parameter.detach().cpu())
        ]
        if len(same) == 1:
            found[name] = (same[0],)
    return found
