"""Which weights a method trains: LoRA factors, some tensors, or all of them. The base is put back bit for bit after."""

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.model.loading import Base, Through
from spunge.recipe.training import Everything, LoRA, Selected
from spunge.unlearning.activations import recomputed
from spunge.unlearning.forms import forms_of
from spunge.unlearning.quick.swapping import quickened
from spunge.unlearning.shards import gathered, shard, swapped, whole
from spunge.unlearning.targets import find_targets
from spunge.weights.adapted import adapted_parameter, factors_of
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Change, LowRank
from spunge.weights.importing import import_peft
from spunge.weights.names import WHOLE


class HasTrainable(Protocol):
    """Settings that say what is trained."""

    @property
    def trainable(self) -> LoRA | Selected | Everything: ...


@dataclass(frozen=True)
class Trained:
    model: Any  # what to call: the base's model, or peft's wrapper of it
    parameters: list[nn.Parameter]
    originals: dict[str, Tensor]  # trained tensor's parameter name -> its base value; empty for LoRA
    changes: Callable[[float], dict[str, Change]]  # sign and strength -> the change so far, by checkpoint name
    as_saved: Callable[
        [float], AbstractContextManager[Any]
    ]  # the same -> inside it, the base with that change is the model in memory
    adapter_off: Callable[[], AbstractContextManager[Any]] = nullcontext
    swaps: bool = False  # adapter_off puts the base's shares into a sharded model
    through: Through | None = (
        None  # a larger model, whose logits are shifted by the change, and are what the losses are of
    )


def stored_entries(settings: HasTrainable, base: Checkpoint) -> int:
    """About how many entries a branch stores, told by the names of the base's tensors."""
    return entries_of(settings.trainable, base)


def entries_of(what: LoRA | Selected | Everything, base: Checkpoint) -> int:
    """The same of what is trained: LoRA's factors, the chosen tensors, or all of them."""
    infos = base.tensors.values()
    if isinstance(what, LoRA):
        named = what.targets if isinstance(what.targets, list) else ["q_proj", "v_proj", "query_key_value", "c_attn"]
        every = what.targets == "all-linear"
        chosen = [info for info in infos if every or any(f".{name}." in info.name for name in named)]
        return sum(what.rank * sum(info.shape) for info in chosen if len(info.shape) == 2)
    if isinstance(what, Selected):
        return sum(info.numel for info in infos if any(fnmatch.fnmatch(info.name, match) for match in what.match))
    return sum(info.numel for info in infos)


@contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Dropout is on inside the block."""
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside the block, whichever modules have it on."""
    on = [module for module in model.modules() if module.training]
    for module in on:
        module.training = False
    try:
        yield
    finally:
        for module in on:
            module.training = True


@contextmanager
def training(
    base: Base, what: LoRA | Selected | Everything, seed: int, setting: str = "unlearn", common: int = 0
) -> Iterator[Trained]:
    """Make `what` trainable in float32 inside the block; the base is restored when it ends. setting: for errors. common: seed
    of the factors that all branches begin with, where they share them."""
    shared = isinstance(what, LoRA) and what.start == "shared"
    torch.manual_seed(common if shared else seed)  # of the factors, and of every dropout
    if isinstance(what, LoRA):
        with _lora(base, what, setting) as trained, recomputed(base), _quickened(trained, base):
            if shared:
                torch.manual_seed(seed)
            trained = replace(trained, through=base.through)
            yield _shared_out(trained, base, seed) if base.ranks.shared else trained
        return
    names = base.trainable(name for name, _ in base.model.named_parameters())
    if isinstance(what, Selected):
        of = "" if base.part is None else f" of the {base.part} part (model.part)"
        for pattern in what.match:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(
                    f"{setting}.trainable.match: no parameter{of} matches {pattern!r}; one is called {names[-1]!r}"
                )
        names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in what.match)]
    own = _sharded_tensors(base, names, seed, setting) if base.ranks.shared else training_tensors(base, names, setting)
    with own as trained, recomputed(base), _quickened(trained, base):
        yield replace(trained, through=base.through)


def _quickened(trained: Trained, base: Base) -> AbstractContextManager[None]:
    # Blocks that are computed again in the backward pass are called outside of the model.
    whole = not (base.checkpoint_activations or base.ranks.shared)
    return quickened(trained.model, forms_of(base.device), whole)


def _shared_out(trained: Trained, base: Base, seed: int) -> Trained:
    """The same, of which each process holds its shares."""
    parameters: list[nn.Parameter] = [*shard(trained.model, base).values()]
    torch.manual_seed(seed + base.ranks.rank)  # each drops entries of its own rows

    learned = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def adapter_off() -> Iterator[None]:
        # peft marks the factors as not trained meanwhile. A model that is called so for the first time would keep them as that,
        # once they are put together of all shares.
        with trained.adapter_off():
            for name, parameter in trained.model.named_parameters():
                if name in learned:
                    parameter.requires_grad_(True)
            yield

    def changes(factor: float) -> dict[str, Change]:
        every = trained.changes(factor)
        return every if base.ranks.main else {}

    return replace(trained, parameters=parameters, changes=changes, adapter_off=adapter_off)


@contextmanager
def training_tensors(base: Base, names: list[str], setting: str = "unlearn") -> Iterator[Trained]:
    """Make the named parameters trainable, as float32 copies, inside the block."""
    _refuse_tensors(base, names, setting)
    parameters = dict(base.model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    originals = {name: parameter.data for name, parameter in chosen.items()}
    for parameter in chosen.values():
        # A float32 master copy: bfloat16 would swallow most steps of a small learning rate.
        parameter.data = parameter.data.float().clone()
        parameter.requires_grad_(True)

    def changes(factor: float) -> dict[str, Change]:
        by_name: dict[str, Change] = {}
        for name, parameter in chosen.items():
            change = factor * (parameter.detach() - originals[name].float())
            by_name.update(base.stored(name, change))
        return by_name

    @contextmanager
    def as_saved(factor: float) -> Iterator[None]:
        held = {name: parameter.data for name, parameter in chosen.items()}
        for name, parameter in chosen.items():
            original = originals[name]
            now = held[name] if factor == 1 else original.float() + factor * (held[name] - original.float())
            parameter.data = now.to(original.dtype)
        try:
            yield
        finally:
            for name, parameter in chosen.items():
                parameter.data = held[name]

    try:
        yield Trained(base.model, list(chosen.values()), originals, changes, as_saved)
    finally:
        for name, parameter in chosen.items():
            parameter.grad = None
            parameter.data = originals[name]
            parameter.requires_grad_(False)


def _refuse_tensors(base: Base, names: list[str], setting: str) -> None:
    """Raises RecipeError for tensors that cannot be trained in full."""
    if base.train_in is not None:
        raise RecipeError(
            f"model.train_in: {base.train_in}: LoRA alone can be trained beside packed weights; set {setting}.trainable to "
            "{kind: lora}, or leave train_in out"
        )
    missing = [name for name in names if name not in base.names]
    if missing:
        raise RecipeError(f"{setting}.trainable: {missing[0]!r} is in the model but not in the checkpoint")


@contextmanager
def _sharded_tensors(base: Base, names: list[str], seed: int, setting: str) -> Iterator[Trained]:
    """As `training_tensors`, of which each process holds its shares: of the float32 copies, and of the base's values beside. The
    model is of no use afterwards."""
    _refuse_tensors(base, names, setting)
    dtypes = {}
    for name in names:
        parameter = base.model.get_parameter(name)
        dtypes[name] = parameter.dtype
        parameter.requires_grad_(True)
    shares = shard(base.model, base)
    originals = {name: share.detach().to(dtypes[name], copy=True) for name, share in shares.items()}
    torch.manual_seed(seed + base.ranks.rank)

    def changes(factor: float) -> dict[str, Change]:
        by_name: dict[str, Change] = {}
        base.model.reshard()
        for name, share in shares.items():
            change = factor * (share.detach() - originals[name].float())
            every = gathered(change, base.model.get_parameter(name))
            if base.ranks.main:
                by_name.update(base.stored(name, every.cpu()))
        return by_name

    def as_saved(factor: float) -> AbstractContextManager[None]:
        raise RecipeError(
            "watch: a model that several processes train together is not measured on its way; leave watch out"
        )

    def as_base() -> AbstractContextManager[None]:
        return swapped(base.model, shares, originals)

    yield Trained(base.model, list(shares.values()), {}, changes, as_saved, as_base, swaps=True)


@contextmanager
def _lora(base: Base, what: LoRA, setting: str) -> Iterator[Trained]:
    import_peft()
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = find_targets(base, what.targets, what.dropout, f"{setting}.trainable")
    config = LoraConfig(
        r=what.rank,
        lora_alpha=what.alpha,
        lora_dropout=what.dropout,
        target_modules=targets.layers,
        target_parameters=targets.parameters or None,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(base.model, config)
    except ValueError as error:
        _unwrap(base.model)
        raise RecipeError(f"{setting}.trainable.targets: {what.targets!r}: {str(error).splitlines()[0]}") from None
    layers = {
        f"{path.replace('.base_layer', '')}.{adapted_parameter(layer)}": layer
        for path, layer in wrapped.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()

    def changes(sign: float) -> dict[str, Change]:
        by_name: dict[str, Change] = {}
        for name, layer in layers.items():
            with whole(layer):
                factors = factors_of(layer)
            if factors is None:
                raise ValueError(f"peft adapts {name} by no product of two factors")
            now = LowRank(
                factors.A.float().clone(), factors.B.float().clone(), sign * factors.scale, factors.transposed
            )
            by_name.update({stored: now.part(base.regions.get(stored, WHOLE)) for stored in base.names[name]})
        return by_name

    @contextmanager
    def as_saved(factor: float) -> Iterator[None]:
        held = {name: dict(layer.scaling) for name, layer in layers.items()}
        for layer in layers.values():
            layer.scaling.update({adapter: factor * scale for adapter, scale in layer.scaling.items()})
        try:
            with base.autocast():  # the factors are float32
                yield
        finally:
            for name, layer in layers.items():
                layer.scaling.update(held[name])

    @contextmanager
    def adapter_off() -> Iterator[None]:
        # peft's own disable_adapter looks through the whole model, twice a call: a tenth of a step on a GPU.
        for layer in layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers.values():
                layer.enable_adapters(True)

    try:
        yield Trained(wrapped, parameters, {}, changes, as_saved, adapter_off)
    finally:
        _unwrap(base.model)


def _unwrap(model: nn.Module) -> None:
    """Take peft's layers out of a model, also where it has put in some of them and then raised an error."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and not path.endswith(".base_layer"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    model.requires_grad_(False)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)
