"""PEFT LoRA adapters, written from a merged delta.

peft itself makes the layers and their names, in the base's model without memory: the model's names, not the checkpoint's, so
that whatever loads peft's adapters applies it.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.weights.adapted import NAME, adapted_parameter, changes_of, fill_hollow, set_factors, targets_of
from spunge.weights.adapters import WEIGHTS
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.fitting import ROOT, MisfitError, put_in
from spunge.weights.importing import import_peft
from spunge.weights.matching import value_of
from spunge.weights.names import Layout, UnbuildableError, layout_of, skeletons
from spunge.weights.writing import write_tensors


class Fit(NamedTuple):
    """How much of a change an adapter of some rank holds."""

    name: str  # of the model's tensor
    residual: float  # Frobenius norm of what is left out, over the norm of the change; 1 where nothing fits
    norm: float  # of the change


class Factors(NamedTuple):
    """A low-rank change, as its parameter lies."""

    a: Tensor  # (..., r, columns)
    b: Tensor  # (..., rows, r)


class Parts(NamedTuple):
    """What an adapter is made of, by the names of the model's tensors."""

    factors: dict[str, Factors]
    whole: dict[str, Tensor]  # new values


def write_adapter(
    out: Path, base: Checkpoint, changes: Iterable[tuple[str, Tensor]], names: Collection[str], rank: int
) -> list[Fit]:
    """Write the LoRA adapter of the given rank that is nearest to a change of weights, tensor by tensor.

    changes: the base's tensors and their differences, of which `names` are all that come. The factors come from a randomised
    SVD (Halko et al. 2011, arXiv:0909.4061) with four power iterations; of experts in one tensor each has its own. Embeddings
    that the base ties to the output layer are stored whole, both: peft's merge would add their factors twice. What is no
    matrix (norms, biases) can't be in an adapter: its residual is 1. Raises RecipeError when there is no matrix.
    """
    classes = _classes(base)
    layout = max((each for _, each in classes), key=lambda each: sum(name in each.homes for name in names))
    modules = dict(classes[[each for _, each in classes].index(layout)][0].named_modules())
    tied = {first for name, first in layout.aliases.items() if name != first}
    parts = Parts({}, {})
    fits: list[Fit] = []
    for name, change in _by_the_models_names(changes, names, layout):
        if not (norm := float(change.norm())):
            continue
        if name in tied:
            dtype = base.tensors[next(iter(layout.regions[name]))].dtype
            parts.whole[name] = (value_of(name, layout, base) + change).to(dtype)
            fits.append(Fit(name, 0.0, norm))
        elif change.ndim in (2, 3) and _is_matrix(modules.get(name.rpartition(".")[0])):
            parts.factors[name] = _factored_each(change, rank)
            left = change - parts.factors[name].b @ parts.factors[name].a
            fits.append(Fit(name, float(left.norm()) / norm, norm))
        else:
            fits.append(Fit(name, 1.0, norm))
    if not parts.factors and not parts.whole:
        raise RecipeError("--as-adapter: the merge changes no matrix; write a delta instead (--as-delta)")
    model, own = _in_first_class(parts, layout, classes)
    _write(out, model, own, rank, base.folder.resolve().name)
    _require_loadable(out, base, type(model), own)
    return fits


def _require_loadable(out: Path, base: Checkpoint, kind: type[nn.Module], parts: Parts) -> None:
    """Raises RecipeError where peft, loading the adapter, would change something else: it translates the names of some models."""
    import_peft()
    from peft import PeftConfig

    model = next(made for make in skeletons(base.folder) if type(made := make()) is kind)
    try:
        read = changes_of(put_in(model, PeftConfig.from_pretrained(str(out)), load_file(out / WEIGHTS)))
        wrong = [name for name, pair in parts.factors.items() if not _is_same(read.factors.get(name), pair)]
        reason = f"of {wrong[0]} it makes something else" if wrong else ""
    except MisfitError as misfit:
        reason = f"it {misfit}"
    if reason:
        raise RecipeError(
            f"--as-adapter: peft does not load again what it writes for {kind.__name__} ({reason}); write the checkpoint, or "
            "--as-delta"
        )


def _is_same(read: LowRank | None, pair: Factors) -> bool:
    if read is None:
        return False
    a, b = (read.B.mT, read.A.mT) if read.transposed else (read.A, read.B)
    return torch.equal(a, pair.a) and torch.equal(b, pair.b)


def _classes(base: Checkpoint) -> list[tuple[nn.Module, Layout]]:
    """The base's model without memory, as each of the classes that it is loaded as, and how it takes the base's tensors."""
    try:
        models = [make() for make in skeletons(base.folder)]
    except UnbuildableError as reason:
        raise RecipeError(
            f"--as-adapter: transformers builds no model of {str(base.folder)!r} ({reason}), so that its layers are not known; "
            "write the checkpoint, or a delta (--as-delta)"
        ) from None
    return [(model, layout_of(model, base)) for model in models]


def _in_first_class(
    parts: Parts, layout: Layout, classes: Sequence[tuple[nn.Module, Layout]]
) -> tuple[nn.Module, Parts]:
    """The first class that has all that was changed (what was changed may all be in the language part), and the parts by its
    names: that of causal language models, over which people put adapters, before others."""
    stored = {name: next(iter(layout.regions[name])) for name in [*parts.factors, *parts.whole]}
    model, own = next(pair for pair in classes if all(name in pair[1].homes for name in stored.values()))
    names = {name: own.homes[each][0] for name, each in stored.items()}
    whole = {
        alias: value.clone()  # safetensors stores no tensor under two names
        for name, value in parts.whole.items()
        for alias, first in own.aliases.items()
        if first == names[name]
    }
    return model, Parts({names[name]: pair for name, pair in parts.factors.items()}, whole)


def _by_the_models_names(
    changes: Iterable[tuple[str, Tensor]], names: Collection[str], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Changes of the model's tensors, each when all that lies in it has come; of what the model does not take, as it came."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, change in changes:
        if name not in layout.homes:
            yield name, change
            continue
        home, _region = layout.homes[name]
        waiting.setdefault(home, {})[name] = change
        if waiting[home].keys() >= {stored for stored in layout.regions[home] if stored in names}:
            whole = torch.zeros(layout.shapes[home])
            for stored, value in waiting.pop(home).items():
                layout.regions[home][stored].of(whole).copy_(value)
            yield home, whole


def _is_matrix(module: nn.Module | None) -> bool:
    """Whether what a module multiplies by is a matrix, or some of them: not the kernel of a convolution, nor a table that
    a block keeps beside its layers (Mamba's A_log)."""
    if module is None or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return all(next(child.parameters(), None) is None for child in module.children())


def _factored_each(change: Tensor, rank: int) -> Factors:
    """Factors of a matrix, or of each of several."""
    if change.ndim == 2:
        a, b, _residual = factored(change, rank)
        return Factors(a, b)
    pairs = [factored(each, rank) for each in change]
    return Factors(torch.stack([a for a, _, _ in pairs]), torch.stack([b for _, b, _ in pairs]))


def _write(out: Path, model: nn.Module, parts: Parts, rank: int, base: str) -> None:
    import_peft()
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    factors = parts.factors or _nothing(model, parts.whole, rank)
    targets = targets_of(model, factors)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets.layers,
        target_parameters=targets.parameters or None,
        modules_to_save=[name.removesuffix(".weight") for name in parts.whole] or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    fill_hollow(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel(model, config, NAME, low_cpu_mem_usage=True)
        except ValueError as error:  # layers that peft adapts in no model of a kind, such as Mamba's out_proj
            raise RecipeError(f"--as-adapter: {error}; write the checkpoint, or a delta (--as-delta)") from None
        for path, layer in wrapped.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                pair = factors[f"{path.replace('.base_layer', '')}.{adapted_parameter(layer)}"]
                set_factors(layer, *pair)
        stored: dict[str, Any] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    stored |= {f"{ROOT}{name}": value for name, value in parts.whole.items()}
    write_tensors(out / WEIGHTS, {key: value.contiguous() for key, value in stored.items()}, {"format": "pt"})
    wrapped.peft_config[NAME].save_pretrained(str(out))


def _nothing(model: nn.Module, whole: Collection[str], rank: int) -> dict[str, Factors]:
    """A layer that adds nothing, for an adapter of which all is stored whole: peft has none without a layer."""
    names = (f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear))
    name = next(name for name in names if name not in whole)
    rows, columns = model.get_parameter(name).shape
    return {name: Factors(torch.zeros(rank, columns), torch.zeros(rows, rank))}


def factored(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (rank, in), B (out, rank) with B @ A near delta (out, in), and the relative residual."""
    kept = min(rank, *delta.shape)
    probe = torch.randn(delta.shape[1], min(kept + 8, *delta.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(delta @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    root = s[:kept].sqrt()
    b, a = (basis @ u[:, :kept]) * root, root.unsqueeze(1) * vh[:kept]
    if kept < rank:  # the adapter has one rank for all: pad with zeros
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], dim=1)
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
    norm = float(delta.norm())
    return a.contiguous(), b.contiguous(), float((delta - b @ a).norm()) / norm if norm else 0.0
