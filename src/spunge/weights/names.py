"""Stored names and module names: which of a checkpoint's tensors transformers puts where in a model.

A checkpoint's names are not always the model's: published GPT-2 leaves out `transformer.`, Gemma 3 and LLaVA were stored
with other wrappers than today's, a block's experts are stored one matrix each and kept in one parameter. transformers
translates on loading, by tables (`conversion_mapping`, `base_model_prefix`, tied weights). The same tables are read here,
on a model without memory (the meta device): nothing is loaded.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spunge.weights.checkpoint import Checkpoint
from spunge.weights.described import described_by

Axis = int | tuple[int, int, int]  # one index, or (start, size, the stored tensor's dimension)


class Region(NamedTuple):
    """Where in a tensor of the model one of the checkpoint's lies: all of it, an expert's matrix, or some of its rows."""

    at: tuple[int | slice, ...] = ()
    transposed: bool = False  # stored with its last two dimensions the other way round

    def of(self, tensor: Tensor) -> Tensor:
        """The stored tensor, as a view of the model's."""
        view = tensor[self.at] if self.at else tensor
        return view.transpose(-1, -2) if self.transposed else view


WHOLE = Region()


@dataclass(frozen=True)
class Layout:
    """How a model takes a checkpoint's tensors.

    `regions`: the model's tensor -> the stored tensors in it, each with its region. A tied tensor that is stored under both
    of its names has two that are all of it. `aliases`: every name of a tensor of the model -> the one that it has in
    `regions`. `scattered`: stored tensors that are cut up or mixed on loading, so that they are no region of one tensor.
    `unused`: stored tensors that the model does not take.
    """

    regions: Mapping[str, Mapping[str, Region]]
    shapes: Mapping[str, tuple[int, ...]]  # of the model's tensors
    aliases: Mapping[str, str]
    scattered: frozenset[str]
    unused: frozenset[str]

    @cached_property
    def homes(self) -> dict[str, tuple[str, Region]]:
        """Stored tensor -> the model's tensor that it lies in, and where."""
        return {stored: (name, region) for name, inner in self.regions.items() for stored, region in inner.items()}


def skeletons(folder: Path) -> list[Callable[[], nn.Module]]:
    """Makers of the models that a checkpoint is loaded as, without memory: the causal language model, the class that its
    config.json names, the vision-language model. They, and this, raise UnbuildableError with transformers' own reason.
    """
    import transformers

    config = _building(described_by, folder)
    makers: dict[str, Callable[[], nn.Module]] = {}

    def add(auto: Any) -> None:
        if type(config) in auto._model_mapping:
            makers.setdefault(auto._model_mapping[type(config)].__name__, partial(_on_meta, auto.from_config, config))

    add(transformers.AutoModelForCausalLM)
    for name in config.architectures or []:
        if (kind := getattr(transformers, name, None)) is not None:
            makers.setdefault(name, partial(_on_meta, kind._from_config, config))
    add(transformers.AutoModelForImageTextToText)
    return list(makers.values())


class UnbuildableError(Exception):
    """Why transformers builds no model of a configuration, in its own words."""


def _on_meta(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = _building(make, copy.deepcopy(config))
    return model.eval()


def _building(step: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return step(argument)
    except Exception as error:  # configurations of strangers: whatever an architecture objects to
        lines = str(error).strip().splitlines()
        raise UnbuildableError(lines[0] if lines else type(error).__name__) from error


def layout_of(model: nn.Module, checkpoint: Checkpoint) -> Layout:
    """How transformers puts a checkpoint into a model (in memory, or without)."""
    own = dict(model.state_dict(keep_vars=True))
    taken, unused = _taken(model, checkpoint.tensors, own)
    aliases = _aliases(own, taken, checkpoint)
    regions: dict[str, dict[str, Region]] = {}
    scattered: set[str] = set()
    for name, pieces in taken.items():
        within = _regions(pieces, checkpoint, tuple(own[name].shape)) if name in own else None
        if within is None:
            scattered.update(stored for group in pieces.groups.values() for stored in group)
        else:
            regions.setdefault(aliases[name], {}).update(within)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    return Layout(regions, shapes, aliases, frozenset(scattered), frozenset(unused))


class _Pieces(NamedTuple):
    """What becomes one tensor of the model (or, cut up, several): stored tensors by pattern, and what is done to them."""

    operations: Sequence[Any]  # transformers' ConversionOps; none: the tensor is taken as it is
    patterns: Sequence[str]
    groups: dict[str, list[str]]


class _Tables(NamedTuple):
    """transformers' translations of stored names for one model."""

    renamings: Sequence[Any]
    converters: Sequence[Any]


def _tables(model: nn.Module) -> _Tables:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return _Tables(renamings, [each for each in transforms if isinstance(each, WeightConverter)])


def _renamed(name: str, tables: _Tables, model: nn.Module, own: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """A stored name as the model's, and the converter's pattern that it matches, if any."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    key, pattern = rename_source_key(name, tables.renamings, tables.converters, prefix, own)
    if key not in own and name in own:
        key, pattern = rename_source_key(name, [], [], prefix, own)
    return key, pattern


def text_part(model: Any) -> str:
    """The path of a model's decoder, as it is in a vision-language model too; "" where the model has no such part."""
    decoder = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return ""  # an output layer that is called `decoder`
    return next((path for path, module in model.named_modules() if module is decoder), "")


def module_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Modules by the names that they once had, or have in a checkpoint -> their names in the model; unknown ones are left out."""
    tables, own = _tables(model), dict(model.state_dict(keep_vars=True))
    text = text_part(model)
    renamed: dict[str, str] = {}
    for name in names:
        key, pattern = _renamed(f"{name}.weight", tables, model, own)
        # The language part by itself calls `model.layers` what is `model.language_model.layers` in the whole.
        inside = f"{text}.{name.rpartition('language_model.')[2].removeprefix('model.')}.weight"
        for candidate in (key if pattern is None else "", inside):
            if candidate in own:
                renamed.setdefault(name, candidate.removesuffix(".weight"))
    return renamed


def _taken(model: nn.Module, stored: Iterable[str], own: Mapping[str, Tensor]) -> tuple[dict[str, _Pieces], set[str]]:
    """Follows transformers' `convert_and_load_state_dict_in_model`, names alone; and the names that the model does not take."""
    from transformers.core_model_loading import dot_natural_key

    tables = _tables(model)
    by_pattern = {pattern: converter for converter in tables.converters for pattern in converter.source_patterns}
    taken: dict[str, _Pieces] = {}
    unused: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = _renamed(name, tables, model, own)
        if key not in own:
            unused.add(name)
        elif pattern is None:
            taken.setdefault(key, _Pieces((), (), {})).groups[name] = [name]
        else:
            converter = by_pattern[pattern]
            pieces = taken.setdefault(key, _Pieces(converter.operations, converter.source_patterns, {}))
            pieces.groups.setdefault(pattern, []).append(name)
    return taken, unused


def _aliases(own: Mapping[str, Tensor], taken: Mapping[str, _Pieces], checkpoint: Checkpoint) -> dict[str, str]:
    """Each name of the model's tensors -> the first name of the same tensor; tied tensors that the checkpoint stores twice,
    with different values, are not tied on loading."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in own.items():
        known = first.setdefault(id(tensor), name)
        if known != name and known in taken and name in taken and tensor.is_meta:
            ours, theirs = (next(iter(taken[each].groups)) for each in (known, name))
            if not torch.equal(checkpoint.read(ours), checkpoint.read(theirs)):
                known = name
        aliases[name] = known
    return aliases


def _regions(pieces: _Pieces, checkpoint: Checkpoint, shape: tuple[int, ...]) -> dict[str, Region] | None:
    """Where each stored tensor lies in the model's, of this shape; None where one is cut up or mixed, or they do not fit."""
    blocks = {
        pattern: [_Block.whole(name, checkpoint.tensors[name].shape) for name in names]
        for pattern, names in pieces.groups.items()
    }
    if not pieces.operations:
        whole = all(block.extent == shape for group in blocks.values() for block in group)
        return dict.fromkeys(pieces.groups, WHOLE) if whole else None
    lists: dict[str, list[list[_Block]]] = {pattern: [[block] for block in group] for pattern, group in blocks.items()}
    for operation in pieces.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            lists = {pattern: [_stacked(tensors, operation.dim)] for pattern, tensors in lists.items()}
        elif kind == "Concatenate":
            ordered = [tensor for pattern in pieces.patterns for tensor in lists.get(pattern, [])]
            lists = {"": [_concatenated(ordered, operation.dim)]}
        elif kind == "Transpose":
            turned = {
                pattern: [[block.swapped(operation.dim0, operation.dim1) for block in blocks] for blocks in tensors]
                for pattern, tensors in lists.items()
            }
            # With check_dims, a tensor that has the model's shape already is left as it is.
            fits = operation.check_dims and all(_covered(blocks) == shape for [blocks] in lists.values())
            lists = lists if fits else turned
        else:
            return None
    parts = [block for tensors in lists.values() for blocks in tensors for block in blocks]
    if len(lists) != 1 or _covered(parts) != shape:
        return None
    return {block.name: block.region(shape) for block in parts}


class _Block(NamedTuple):
    """A stored tensor inside a larger one: along each of its dimensions an index, or (start, size, the stored dimension)."""

    name: str
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> "_Block":
        return cls(name, tuple((0, size, dimension) for dimension, size in enumerate(shape)))

    @property
    def extent(self) -> tuple[int, ...]:
        """How far it reaches along each dimension."""
        return tuple(axis + 1 if isinstance(axis, int) else axis[0] + axis[1] for axis in self.axes)

    def stacked(self, dim: int, place: int) -> "_Block":
        return _Block(self.name, (*self.axes[:dim], place, *self.axes[dim:]))

    def moved(self, dim: int, by: int) -> "_Block":
        axis = self.axes[dim]
        after = axis + by if isinstance(axis, int) else (axis[0] + by, *axis[1:])
        return _Block(self.name, (*self.axes[:dim], after, *self.axes[dim + 1 :]))

    def swapped(self, one: int, other: int) -> "_Block":
        axes = list(self.axes)
        axes[one], axes[other] = axes[other], axes[one]
        return _Block(self.name, tuple(axes))

    def region(self, shape: Sequence[int]) -> Region:
        index = tuple(axis if isinstance(axis, int) else slice(axis[0], axis[0] + axis[1]) for axis in self.axes)
        order = [axis[2] for axis in self.axes if not isinstance(axis, int)]
        full = [part == slice(0, size) for part, size in zip(index, shape, strict=True)]
        last = max((place for place, whole in enumerate(full) if not whole), default=-1)
        return Region(index[: last + 1], order != sorted(order))


def _stacked(tensors: Sequence[Sequence[_Block]], dim: int) -> list[_Block]:
    return [block.stacked(dim, place) for place, blocks in enumerate(tensors) for block in blocks]


def _concatenated(tensors: Sequence[Sequence[_Block]], dim: int) -> list[_Block]:
    placed: list[_Block] = []
    for blocks in tensors:
        start = _covered(placed)[dim] if placed else 0
        placed += [block.moved(dim, start) for block in blocks]
    return placed


def _covered(blocks: Sequence[_Block]) -> tuple[int, ...]:
    """The shape that the blocks make up together."""
    return tuple(max(reach) for reach in zip(*(block.extent for block in blocks), strict=True))
