"""Open what was given as a difference from the base, whatever it is, and check that it fits."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.weights import delta
from spunge.weights.adapters import WEIGHTS, open_adapter
from spunge.weights.checkpoint import ADAPTER, Checkpoint, has_model, read_config, read_object
from spunge.weights.configuration import compared
from spunge.weights.folder import note_of
from spunge.weights.hub import fetched
from spunge.weights.matching import matched, share_a_class
from spunge.weights.quantised import refuse_quantised
from spunge.weights.sources import CheckpointSource, DeltaSource, Source


def open_source(place: "str | Path", base: Path, label: str | None = None, setting: str = "--model") -> Source:
    """Open a delta, a full checkpoint or a LoRA adapter, from a folder or a Hub id (`owner/name`, `owner/name@revision`).

    setting: the recipe's key or the option, for errors. Raises RecipeError when it is none of them, or does not fit the base.
    """
    folder = fetched(place, setting)
    name = label or (str(place) if not os.path.exists(place) else folder.resolve().name)
    stored = stored_weights(folder, setting)
    if stored.of == delta.WEIGHTS:
        return DeltaSource(delta.open_delta(folder, setting), name)
    stored = replace(stored, plain=True)
    if stored.of == WEIGHTS:
        return open_adapter(stored, Checkpoint(base), name)
    refuse_quantised(stored)
    return open_checkpoint(stored, Checkpoint(base), name)


def stored_weights(folder: Path, setting: str) -> Checkpoint:
    """The tensors of a delta, an adapter or a model, whichever the folder holds."""
    if (folder / delta.DESCRIPTION).exists():
        return Checkpoint(folder, setting, delta.WEIGHTS)
    if (folder / ADAPTER).exists() and not has_model(folder):
        return Checkpoint(folder, setting, WEIGHTS)
    return Checkpoint(folder, setting)


def check_source(base: Checkpoint, source: Source) -> None:
    """Raises RecipeError for a delta made from another base, and for tensors that the base lacks or has in other shapes."""
    made_from = source.base
    if made_from is not None and made_from != base.fingerprint():
        raise RecipeError(
            f"{source.setting}: {source.label!r} was made from a base with fingerprint {made_from[:12]}, the one given by "
            f"{base.setting} has {base.fingerprint()[:12]}; give the base it was made from"
        )
    for name in source.names:
        if name not in base.tensors:
            raise RecipeError(
                f"{source.setting}: {source.label!r} changes tensor {name!r}, which the base lacks; is it another model?"
            )
        if source.shape(name) != base.tensors[name].shape:
            raise RecipeError(
                f"{source.setting}: tensor {name!r} of {source.label!r} has shape {list(source.shape(name))}, the base's has "
                f"{list(base.tensors[name].shape)}; is it another model?"
            )


def open_checkpoint(checkpoint: Checkpoint, base: Checkpoint, label: str) -> CheckpointSource:
    """A full checkpoint of the base's architecture. Raises RecipeError naming the first thing that does not fit."""
    ours, theirs = read_config(base.folder, base.setting), read_config(checkpoint.folder, checkpoint.setting)
    for key, what in (("model_type", "architecture"), ("vocab_size", "vocabulary size")):
        differs = key in ours and key in theirs and ours[key] != theirs[key]
        if differs and not (key == "model_type" and share_a_class(base.folder, checkpoint.folder)):
            raise RecipeError(
                f"{checkpoint.setting}: {label!r} has {what} {theirs[key]!r}, the base has {ours[key]!r}; they cannot be merged"
            )
    settings = compared(base, checkpoint, label)
    held, notes = matched(base, checkpoint, label)
    for stored in (stored for place in held.values() for stored, _ in place.pieces):
        if not (dtype := checkpoint.tensors[stored].dtype).is_floating_point:
            raise RecipeError(
                f"{checkpoint.setting}: {label!r} stores tensor {stored!r} as {str(dtype).removeprefix('torch.')}, where the "
                "base has floating-point numbers; is it quantised? Give the unquantised model"
            )
    converted = [note] if (note := note_of(checkpoint.folder)) else []
    tokens = _tokenizer_notes(base, checkpoint, label)
    kept = _kept_integers(base, checkpoint, label)
    return CheckpointSource(checkpoint, label, held, [*converted, *settings, *notes, *kept, *tokens])


def _kept_integers(base: Checkpoint, other: Checkpoint, label: str) -> list[str]:
    """A note where tensors that are no floating-point numbers, which a merge copies from the base, are others there."""
    shared = [
        info.name for info in base.tensors.values() if not info.dtype.is_floating_point and info.name in other.tensors
    ]
    odd = [name for name in shared if not _same_numbers(base.read(name), other.read(name))]
    return (
        [f"{odd[0]!r} of {label!r} differs from the base's, which is kept: it is no floating-point number"]
        if odd
        else []
    )


def _same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whatever they are stored as: masks were bytes once, and are truth values now."""
    return torch.equal(left, right) if left.dtype == right.dtype else torch.equal(left.long(), right.long())


def _tokenizer_notes(base: Checkpoint, other: Checkpoint, label: str) -> list[str]:
    """A note where the token ids differ: the merged model keeps the base's tokenizer."""
    files = [each.folder / "tokenizer.json" for each in (base, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    contents = [read_object(file, each.setting) for file, each in zip(files, (base, other), strict=True)]
    words = [((content.get("model") or {}).get("vocab"), content.get("added_tokens")) for content in contents]
    return [] if words[0] == words[1] else [f"the tokens of {label!r} differ from the base's, whose tokenizer is kept"]
