"""Branches that other tools made: nothing is trained, what they changed enters the run as it is.

    unlearn: {method: precomputed, branches: {Europe: adapters/europe, Asia: owner/without-asia}, joint: adapters/both}

Each place is a spunge delta, a PEFT LoRA adapter or a full checkpoint of the base's architecture. Adapters keep their
factors, deltas the form they have; a checkpoint's change is its difference from the base in float32, tensor by tensor,
without the tensors that are equal.

    spunge run demo --set unlearn='{method: precomputed, branches: {europe: adapters/europe, asia: adapters/asia}}'
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from spunge.errors import RecipeError, suggestion
from spunge.recipe.block import Place
from spunge.recipe.training import MethodSettings
from spunge.unlearning.method import Branch, Method, Task
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change
from spunge.weights.hub import fetched
from spunge.weights.opening import check_source, open_source, stored_weights
from spunge.weights.sources import AdapterSource, DeltaSource, Source

DESCRIPTIONS = ("delta.json", "adapter_config.json", "config.json")  # they say what the tensors beside them mean

_fetched = cache(fetched)  # a Hub id is looked up once a process


def _text_keys(value: Any) -> Any:
    """YAML reads a part such as 2019 as a number."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


class Given(NamedTuple):
    setting: str  # for errors
    path: str  # a folder or a Hub id


class PrecomputedSettings(MethodSettings):
    method: str = "precomputed"
    branches: Annotated[dict[str, str], BeforeValidator(_text_keys), Place("model")] = Field(
        min_length=1,
        description="Part's value -> the folder or Hub id of its delta, LoRA adapter or full checkpoint.",
    )
    joint: Annotated[str | None, Place("model")] = Field(
        None, description="The same for the joint control, which is made from all parts at once."
    )


def stored_entries(settings: PrecomputedSettings, base: Checkpoint) -> int:
    """Of the largest source; one that is not here yet counts as a full checkpoint."""
    places = [Given(f"unlearn.branches.{value}", path) for value, path in settings.branches.items()]
    places += [Given("unlearn.joint", settings.joint)] if settings.joint is not None else []
    return max(_entries(place, base) for place in places)


def inputs(settings: PrecomputedSettings, values: Sequence[str], every: Sequence[str]) -> dict[str, str]:
    """Fingerprints of what stands at a job's place. values: of the job's parts; every: of the run's.

    Raises RecipeError where parts and entries do not match.
    """
    for value in settings.branches:
        if value not in every:
            raise RecipeError(f"unlearn.branches.{value}: there is no part {value!r}{suggestion(value, every)}")
    if len(every) == 1 and settings.joint is not None:
        raise RecipeError(f"unlearn.joint: {every[0]!r} is the only part, and its branch is the control; leave it out")
    place = place_of(settings, values)
    folder = _fetched(place.path, place.setting)
    described = [folder / name for name in DESCRIPTIONS if (folder / name).exists()]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in described}
    return {"weights": stored_weights(folder, place.setting).fingerprint(), **digests}


def unlearn(task: Task, settings: PrecomputedSettings) -> Branch:
    """Take branches that other tools made: deltas, LoRA adapters or full checkpoints."""
    place = place_of(settings, list(task.parts))
    base = Checkpoint(task.base.folder)
    source = open_source(_fetched(place.path, place.setting), base.folder, place.path, place.setting)
    check_source(base, source)
    pairs = ((name, change_of(source, name, base)) for name in source.names)
    changes = {name: change for name, change in pairs if not _is_zero(name, change, place)}
    known = task.base.parameters
    if unknown := [name for name in changes if name not in known]:
        raise RecipeError(f"{place.setting}: {place.path!r} changes {unknown[0]!r}, which is no parameter of the model")
    if not changes:
        raise RecipeError(f"{place.setting}: {place.path!r} changes nothing; it has the base's own weights")
    odd = {"but": "; ".join(source.notes)} if source.notes else {}
    return Branch(changes, 0, {}, notes={"from": place.path, **odd})


def place_of(settings: PrecomputedSettings, values: Sequence[str]) -> Given:
    """Where the change of one part, or of all parts at once, is. Raises RecipeError when the recipe does not say."""
    if len(values) > 1:
        if settings.joint is None:
            raise RecipeError(
                "unlearn.joint: missing, and the joint control needs it; give unlearn.joint, or set controls to []"
            )
        return Given("unlearn.joint", settings.joint)
    [value] = values
    if value not in settings.branches:
        raise RecipeError(f"unlearn.branches: no entry for the part {value!r}{suggestion(value, settings.branches)}")
    return Given(f"unlearn.branches.{value}", settings.branches[value])


def change_of(source: Source, name: str, base: Checkpoint) -> Change:
    """A tensor's change in the form the source stores it; whole weights as their float32 difference from the base's."""
    if isinstance(source, DeltaSource):
        return source.delta.change(name)
    before = base.read(name).float()
    if isinstance(source, AdapterSource):
        factors, whole = source.factors.get(name), source.replaced.get(name, before)
        # peft stores an adapted embedding a second time, whole and unchanged.
        if factors is not None and torch.equal(whole.float(), before):
            return factors
    return source.read(name, 0, before.numel(), before.reshape(-1)).reshape(before.shape)


def _is_zero(name: str, change: Change, place: Given) -> bool:
    """Whether nothing is changed. Raises RecipeError for NaN and Inf."""
    pieces = [change] if isinstance(change, Tensor) else [piece for piece in change if isinstance(piece, Tensor)]
    if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
        raise RecipeError(f"{place.setting}: tensor {name!r} of {place.path!r} holds NaN or Inf; make it again")
    return not all(bool(piece.any()) for piece in pieces)


def _entries(place: Given, base: Checkpoint) -> int:
    folder = Path(place.path)
    stored = stored_weights(folder, place.setting) if folder.is_absolute() or folder.is_dir() else base
    return sum(info.numel for info in stored.tensors.values())


PRECOMPUTED = Method(
    settings=PrecomputedSettings,
    source="weights of spunge, peft or transformers",
    unlearn=unlearn,
    trains=False,
    stored_entries=stored_entries,
    inputs=inputs,
)
