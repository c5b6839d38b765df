"""Which of a model's tensors a LoRA adapts, and whether a branch can hold what it learns: told before anything is trained."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from spunge.errors import RecipeError, suggestion
from spunge.model.loading import Base
from spunge.weights.adapted import Targets, is_plain_layer, targets_of
from spunge.weights.importing import import_peft
from spunge.weights.names import text_part


def find_targets(
    base: Base, wanted: list[str] | Literal["default", "all-linear"], dropout: float, setting: str = "unlearn.trainable"
) -> Targets:
    """The layers, and the tensors that are no layer's weight (experts in one tensor), that `wanted` names.

    A name is that of a layer or tensor in the model or in the checkpoint, or its end. `all-linear`: every linear layer of the
    language part but the output layer; `default`: peft's for the architecture, else as all-linear, without what can be adapted
    without dropout alone. Raises RecipeError for a name that nothing has, and where a branch could not hold what is learned.
    """
    model = base.model
    tensors = model.state_dict(keep_vars=True)  # a tied weight under both of its names
    matrices = [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and tensor.ndim in (2, 3)]
    weights = base.trainable(matrices)
    linear = [name for name in weights if _is_linear(model, name)]
    if isinstance(wanted, list):
        chosen = [name for target in wanted for name in _named(target, base, weights, setting)]
    else:
        chosen = linear
        if wanted == "default":
            usual = [name for name in linear if _ends(name, _usual(model))]
            chosen = usual or [f"{path}.weight" for path in targets_of(model, linear).layers]
    targets = targets_of(model, dict.fromkeys(chosen))
    if targets.parameters and dropout:
        raise RecipeError(
            f"{setting}.dropout: {dropout:g}: {targets.parameters[0]!r} can be adapted without dropout alone (experts in one "
            f"tensor, and what peft takes for them); set {setting}.dropout to 0, or name other targets"
        )
    for path in targets.layers:
        if (reason := _refusal(model, path)) is not None:
            raise RecipeError(f"{setting}.targets: {path!r}: {reason}")
    _require_own_tensors(base, tensors, chosen, setting)
    return targets


def _is_linear(model: Any, name: str) -> bool:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return (
        last == "weight"
        and path.startswith(text_part(model))
        and is_plain_layer(module)
        and not isinstance(module, nn.Embedding)
        and module is not model.get_output_embeddings()
        and _refusal(model, path) is None
    )


def _refusal(model: Any, path: str) -> str | None:
    """Why peft does not adapt a layer that it could: some projections of state-space models are used past their layer."""
    import_peft()
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, path.rpartition(".")[2])
    except ValueError as error:
        return str(error).partition("]")[2].strip()
    return None


def _usual(model: Any) -> list[str]:
    """The layers that peft adapts by default in a model of this kind."""
    import_peft()
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model.config.model_type) or KNOWN.get(model.config.get_text_config().model_type) or []
    return known if isinstance(known, list) else []


def _ends(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name.removesuffix('.weight')}".endswith(f".{target.removesuffix('.weight')}") for target in targets)


def _named(target: str, base: Base, names: list[str], setting: str) -> list[str]:
    """The model's matrices that are called so, or that hold tensors of the checkpoint that are called so."""
    called = [
        name
        for name in names
        if _ends(name, [target]) or any(_ends(each, [target]) for each in base.names.get(name, ()))
    ]
    if not called:
        known = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in names)
        of = "" if base.part is None else f" of the {base.part} part (model.part)"
        raise RecipeError(f"{setting}.targets: no layer{of} is called {target!r}{suggestion(target, known)}")
    return called


def _require_own_tensors(base: Base, tensors: Mapping[str, Tensor], chosen: list[str], setting: str) -> None:
    """Raises RecipeError for a weight that is tied to another, or that the checkpoint does not hold as it is."""
    called: dict[int, list[str]] = {}  # names of one tensor
    for name, tensor in tensors.items():
        called.setdefault(id(tensor), []).append(name)
    for name in chosen:
        layer = name.removesuffix(".weight")
        others = [other for other in called[id(tensors[name])] if other != name]
        if others:
            raise RecipeError(
                f"{setting}.targets: {layer!r} shares its weight with {others[0].removesuffix('.weight')!r}, and LoRA would "
                f"change one of the two alone; leave it out, or train {name!r} in full ({setting}.kind: tensors)"
            )
        if name not in base.names:
            raise RecipeError(
                f"{setting}.targets: {layer!r} is no tensor of the checkpoint, nor made of whole ones; leave it out"
            )
