"""Which of a model's stored tensors are which of the base's, where the two checkpoints don't name or cut them alike."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.names import WHOLE, Layout, Region, UnbuildableError, layout_of, skeletons


class Held(NamedTuple):
    """How a checkpoint holds one of the base's tensors: a region of a tensor of the model's, and what that is stored as."""

    pieces: tuple[tuple[str, Region], ...]  # stored tensors, each with its region of the model's tensor
    shape: tuple[int, ...]  # of the model's tensor
    region: Region = WHOLE  # of it, which is the base's tensor

    @property
    def name(self) -> str | None:
        """The stored tensor that is the base's, where it is stored as such."""
        return next((stored for stored, region in self.pieces if region == self.region), None)

    def of(self, values: Mapping[str, Tensor]) -> Tensor:
        """The base's tensor from the stored tensors' values."""
        whole = torch.empty(self.shape, dtype=next(iter(values.values())).dtype)
        for stored, region in self.pieces:
            region.of(whole).copy_(values[stored])
        return self.region.of(whole)


def value_of(name: str, layout: Layout, checkpoint: Checkpoint) -> Tensor:
    """One of the model's tensors, from the stored ones, in float32."""
    pieces = layout.regions[layout.aliases[name]]
    held = Held(tuple(pieces.items()), layout.shapes[name])
    return held.of({stored: checkpoint.read(stored) for stored in pieces}).float()


def share_a_class(one: Path, other: Path) -> bool:
    """Whether some class of transformers loads both folders, whatever they call their kind: InternLM 3 is saved again as Llama."""
    try:
        kinds = [{type(make()) for make in skeletons(folder)} for folder in (one, other)]
    except UnbuildableError:
        return False
    return bool(kinds[0] & kinds[1])


def matched(base: Checkpoint, other: Checkpoint, label: str) -> tuple[dict[str, Held], list[str]]:
    """The base's floating-point tensors -> how another checkpoint of the same model holds them; and notes on what is odd.

    Tensors that the model itself does not take (buffers that old checkpoints store, heads for several tokens at once) are
    matched by name and left out where only one has them. Raises RecipeError naming the first other tensor that only one has.
    """
    ours, theirs = _floating(base), _floating(other)
    if ours.keys() == theirs.keys():
        return {name: Held(((name, WHOLE),), shape) for name, shape in theirs.items()}, []
    layouts = _layouts(base, other)
    spare = [layout.unused for layout in layouts] if layouts else [frozenset[str](), frozenset[str]()]
    held = {name: _held(name, other, layouts) for name in ours}
    headless = _is_headless(other)
    heads = [
        name for name, place in held.items() if place is None and headless and layouts and _is_head(name, layouts[0])
    ]
    for name, place in held.items():
        if place is None and name not in spare[0] and name not in heads:
            raise RecipeError(
                f"{other.setting}: {label!r} lacks tensor {name!r} of the base; is it another model, or saved in part?"
            )
    used = {stored for place in held.values() if place is not None for stored, _region in place.pieces}
    for name in theirs:
        if name not in used and name not in spare[1] and not (layouts and _is_tied(name, other, *layouts)):
            raise RecipeError(
                f"{other.setting}: {label!r} has tensor {name!r}, which the base lacks; is it another model?"
            )
    odd = [name for name in theirs if name in spare[1] and name not in ours and not COMPUTED.search(name)]
    names = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    notes = [f"left out of {label!r}, since the model does not take them: {names}"] if odd else []
    notes += [f"{label!r} was saved without an output layer: {name!r} is the base's" for name in heads]
    return {name: place for name, place in held.items() if place is not None}, notes


# Buffers that older versions of transformers stored: they are computed.
COMPUTED = re.compile(r"(^|\.)((attn|attention|self_attn)\.(bias|masked_bias)|inv_freq|position_ids)$")


def _is_headless(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was saved from the model without an output layer (LlamaModel), as its config.json says."""
    from transformers import AutoModel

    named = read_config(checkpoint.folder, checkpoint.setting).get("architectures")
    bare = {str(kind) for kinds in AutoModel._model_mapping._model_mapping.values() for kind in _each(kinds)}
    return isinstance(named, list) and len(named) == 1 and named[0] in bare


def _each(kinds: str | tuple[str, ...]) -> tuple[str, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _is_head(name: str, layout: Layout) -> bool:
    """Whether a tensor of the base is the output layer's."""
    return name in layout.homes and layout.homes[name][0].rpartition(".")[0] in ("lm_head", "embed_out", "output")


def _floating(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items() if info.dtype.is_floating_point}


def _layouts(base: Checkpoint, other: Checkpoint) -> tuple[Layout, Layout] | None:
    """Both checkpoints in one class of model, the one that takes most of them; None where transformers builds none."""
    try:
        ours = {type(model := make()): layout_of(model, base) for make in skeletons(base.folder)}
        theirs = {type(model := make()): layout_of(model, other) for make in skeletons(other.folder)}
    except UnbuildableError:
        return None
    pairs = [(ours[kind], theirs[kind]) for kind in ours if kind in theirs]
    return min(pairs, key=lambda pair: len(pair[0].unused) + len(pair[1].unused)) if pairs else None


def _held(name: str, other: Checkpoint, layouts: tuple[Layout, Layout] | None) -> Held | None:
    """How the other checkpoint holds one of the base's tensors; None where it doesn't."""
    if layouts is None or name not in layouts[0].homes:  # nothing that the model takes as it is: told by its name alone
        return Held(((name, WHOLE),), other.tensors[name].shape) if name in other.tensors else None
    ours, theirs = layouts
    home, region = ours.homes[name]
    home = theirs.aliases.get(home, home)
    if (inner := theirs.regions.get(home)) is None:
        return None
    whole = [(stored, part) for stored, part in inner.items() if part == WHOLE]
    return Held(tuple(whole[:1] or inner.items()), theirs.shapes[home], region)


def _is_tied(name: str, other: Checkpoint, ours: Layout, theirs: Layout) -> bool:
    """Whether a tensor that the base lacks is one that the base ties to another, and has the values of that one here too."""
    home, region = theirs.homes.get(name, ("", WHOLE))
    tied = theirs.regions.get(ours.aliases.get(home, ""), {})
    partner = next((stored for stored, part in tied.items() if part == region and stored != name), None)
    return partner is not None and torch.equal(other.read(name), other.read(partner))
