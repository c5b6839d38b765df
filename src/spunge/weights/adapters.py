"""PEFT adapters, opened as a difference from the base: what peft's own `merge_and_unload` would change, tensor by tensor.

A plain LoRA layer gives its factors. It is read in the space of the weights, scale * B @ A, never factor by factor: the mean
of two A's and the mean of two B's do not multiply to the mean of the products (Hu et al. 2021, arXiv:2106.09685). Any other
layer (DoRA, LoHa, IA3 ...) is merged by peft into the base's values of that layer alone, when they are asked for.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spunge.errors import RecipeError
from spunge.weights.adapted import Changes, changes_of, merged_by
from spunge.weights.adapter_config import other_base, read_config
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.fitting import fitted
from spunge.weights.matching import value_of
from spunge.weights.names import Layout, Region
from spunge.weights.quantised import refuse_quantised
from spunge.weights.sources import AdapterSource

WEIGHTS = "adapter_model.safetensors"
# What an adapter's change does not depend on.
_METADATA = ("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode")


def open_adapter(stored: Checkpoint, base: Checkpoint, label: str) -> AdapterSource:
    """Open the adapter whose tensors are `stored`.

    Raises RecipeError for kinds and settings that are not understood, naming the field, and for an adapter that does not fit
    the base in every tensor, naming one that does not.
    """
    who, file = f"{stored.setting}: {label!r}", stored.folder / WEIGHTS
    config = read_config(stored.folder, who)
    if not file.exists():
        raise RecipeError(f"{who} has no {WEIGHTS}; {_in_its_place(stored.folder)}")
    refuse_quantised(stored)
    notes = other_base(config, base.folder, label)
    tensors = {key: stored.read(key) for key in stored.tensors}
    layout, wrapped, matrices = fitted(stored.folder, tensors, base, who)
    changes = changes_of(wrapped)
    kept = {name: value for name, value in changes.replaced.items() if not _is_the_bases(name, value, layout, base)}
    changes = replace(changes, replaced=kept)
    if not any([*changes.added, *changes.replaced, *changes.layers]) and not any(
        map(_is_something, [*changes.factors.values(), *matrices.values()])
    ):
        also = "".join(f" ({note})" for note in notes)
        raise RecipeError(f"{who} changes nothing: of every layer, a factor is zero; has it been trained?{also}")
    _refuse_torn_ties(changes, layout, who)
    content = json.dumps({key: value for key, value in config.items() if key not in _METADATA}, sort_keys=True)
    digest = hashlib.sha256(content.encode() + file.read_bytes()).hexdigest()
    parts = _by_stored_names(changes, layout, base, who)
    shapes = {name: base.tensors[name].shape for name in parts.merged}
    return AdapterSource(
        label,
        digest,
        {**parts.factors, **matrices},
        parts.replaced,
        parts.merged,
        shapes,
        notes,
        setting=stored.setting,
    )


def _in_its_place(folder: Path) -> str:
    """What an adapter's folder holds in place of the one file that peft reads, and what to do with it."""
    if shards := sorted(file.name for file in folder.glob("adapter_model-*.safetensors")):
        there = f"and here are {len(shards)} ({shards[0]} ...)"
        return f"peft reads no adapter in pieces, {there}: join their tensors in one file of that name"
    if (folder / "adapter_model.bin").is_file():
        return "pickled adapters are not read: load it with peft and save it again, which writes safetensors"
    return "the folder holds an adapter's settings alone: download it again, or save the trained model with save_pretrained"


class _Parts(NamedTuple):
    """What an adapter changes, by the base's names."""

    factors: dict[str, LowRank]
    replaced: dict[str, Tensor]
    merged: dict[str, Callable[[], Tensor]]


def _is_the_bases(name: str, value: Tensor, layout: Layout, base: Checkpoint) -> bool:
    """Whether a value that the adapter stores whole is the base's own: peft stores adapted embeddings a second time."""
    if layout.shapes.get(name) != tuple(value.shape) or layout.aliases[name] not in layout.regions:
        return False
    return torch.equal(value.float(), value_of(name, layout, base))


def _is_something(factors: LowRank) -> bool:
    return bool(factors.A.any()) and bool(factors.B.any())


def _refuse_torn_ties(changes: Changes, layout: Layout, who: str) -> None:
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
                f"{who} changes {name!r}, which the base ties to {others}: one stored tensor cannot hold both; "
                "merge it with peft, which unties them, and give that model with a base that has them apart"
            )


def _by_stored_names(changes: Changes, layout: Layout, base: Checkpoint, who: str) -> _Parts:
    """Raises RecipeError where the base stores no tensor that holds a change as it is."""
    factors: dict[str, LowRank] = {}
    replaced: dict[str, Tensor] = {}
    merged: dict[str, Callable[[], Tensor]] = {}
    for name, pair in changes.factors.items():
        if pair.shape != layout.shapes.get(name):
            raise RecipeError(
                f"{who} adapts {name!r} of shape {list(pair.shape)}, the base's is {layout.shapes.get(name)}"
            )
        factors.update({stored: pair.part(region) for stored, region in _stored(name, layout, who).items()})
    for name, value in changes.replaced.items():
        if name not in changes.layers:
            replaced.update({stored: region.of(value) for stored, region in _stored(name, layout, who).items()})
    for name in [*changes.layers, *changes.added]:
        for stored, region in _stored(name, layout, who).items():
            merged[stored] = partial(_difference, name, region, changes, layout, base)
    return _Parts(factors, replaced, merged)


def _stored(name: str, layout: Layout, who: str) -> Mapping[str, Region]:
    pieces = layout.regions.get(layout.aliases.get(name, name))
    if pieces is None:
        raise RecipeError(
            f"{who} changes {name!r}, which is no tensor of the base's files, nor made of whole ones; merge it "
            "with peft and give that model"
        )
    return pieces


def _difference(name: str, region: Region, changes: Changes, layout: Layout, base: Checkpoint) -> Tensor:
    """What peft's layer makes of the base's values of one tensor, less these values; a region of it, float32."""
    if name in changes.added:
        return region.of(changes.added[name].float())
    layer, parent = changes.layers[name], name.rpartition(".")[0]
    values: dict[str, Tensor] = {}
    for each, _ in layer.get_base_layer().named_parameters(recurse=False):
        stored = changes.replaced.get(f"{parent}.{each}")
        values[each] = value_of(f"{parent}.{each}", layout, base) if stored is None else stored.float()
    after = merged_by(layer, values)[name.rpartition(".")[2]]
    return region.of(after - value_of(name, layout, base))
