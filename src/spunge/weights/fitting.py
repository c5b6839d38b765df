"""An adapter in its base's model: peft puts it into a model without memory, of the class and by the names that take all of it.

Which layers are adapted, how they are scaled and which way round they lie is peft's own doing.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from spunge.errors import RecipeError, first_line, suggestion
from spunge.weights.adapted import NAME, fill_hollow, taken_for_experts, targets_of
from spunge.weights.adapter_config import expressions
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import LowRank
from spunge.weights.expressions import Expression, refuse_endless
from spunge.weights.importing import import_peft
from spunge.weights.names import Layout, UnbuildableError, layout_of, module_names, skeletons, text_part

ROOT = "base_model.model."
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block, of an expert


class Fitted(NamedTuple):
    """An adapter in its base's model."""

    layout: Layout  # how that class of model takes the base's tensors
    wrapped: Any  # peft's model, or None where nothing is left for it
    matrices: dict[str, LowRank]  # what is added to stored tensors that are no layers of the model: single experts


def fitted(folder: Path, tensors: Mapping[str, Tensor], base: Checkpoint, who: str) -> Fitted:
    """An adapter in the first class of model that takes all of it.

    Raises RecipeError naming what fits nowhere. `who` begins its errors: the setting and the adapter's name.
    """
    import_peft()
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever the class of a kind objects to
        raise RecipeError(f"{who} has settings that peft does not take: {first_line(error)}") from None
    problems: list[str] = []
    try:
        asked = [*expressions(config.to_dict(), who)]
        for attempt in _attempts(skeletons(base.folder), config, tensors, base, asked):
            layout = layout_of(attempt.model, base)
            try:
                if attempt.missing:
                    problems.insert(
                        0, f"holds nothing for {attempt.missing!r}, which its settings call for; the file is incomplete"
                    )
                    break
                alone = attempt.matrices and not attempt.tensors
                wrapped = None if alone else put_in(attempt.model, attempt.config, attempt.tensors)
                return Fitted(layout, wrapped, attempt.matrices)
            except MisfitError as misfit:
                problems.append(str(misfit))
    except UnbuildableError as reason:
        raise RecipeError(
            f"{who} cannot be fitted to the base, of which transformers builds no model ({reason}); merge it with peft and give "
            "that model"
        ) from None
    raise RecipeError(f"{who} {problems[0]}")


class _Attempt(NamedTuple):
    """What may fit together."""

    model: nn.Module
    config: Any
    tensors: Mapping[str, Tensor]
    matrices: dict[str, LowRank]
    missing: str = ""  # a layer that the settings call for, by its name there, and that has no tensors


def _attempts(
    makers: Sequence[Callable[[], nn.Module]],
    config: Any,
    tensors: Mapping[str, Tensor],
    base: Checkpoint,
    asked: Sequence[Expression],
) -> Iterator[_Attempt]:
    """The adapter as it is in every class of model; then, for a LoRA, by the model's own names for its layers."""
    for make in makers:
        model = make()
        refuse_endless(asked, [name for name, _ in model.named_modules()])
        yield _Attempt(model, config, tensors, {})
    for make in makers if config.peft_type == "LORA" else ():
        attempt = _renamed(make(), config, tensors, base, asked)
        confused = any(_module_of(key).rpartition(".")[2] in taken_for_experts(attempt.model) for key in tensors)
        if confused or attempt.tensors.keys() != tensors.keys():
            yield attempt


def _renamed(
    model: nn.Module, config: Any, tensors: Mapping[str, Tensor], base: Checkpoint, asked: Sequence[Expression]
) -> _Attempt:
    """A LoRA whose layers have other names than the model's (those of an older transformers, or of the base's files), by the
    model's: each layer with its own rank and alpha, as the settings say for it under its old name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    names = module_names(model, dict.fromkeys(_module_of(key) for key in tensors))
    refuse_endless(asked, {_module_of(key) for key in tensors})
    matrices, rest = _matrices(config, tensors, base, names)
    old = {key: _module_of(key) for key in rest}
    adapted = {old[key]: names[old[key]] for key in rest if ".lora_" in key and old[key] in names}
    whole = {old[key]: names[old[key]] for key in rest if ".lora_" not in key and old[key] in names}
    settings = copy.deepcopy(config)
    chosen = {
        name for name, _ in model.named_modules() if config.target_modules and check_target_module_exists(config, name)
    }
    beyond = [name for name in chosen - set(adapted.values()) if name.startswith(text_part(model))]
    # They speak of the old names, or of other parts of a model too, of which the adapter was trained on the language part.
    if not chosen >= set(adapted.values()) or not beyond:
        targets = targets_of(model, [f"{name}.weight" for name in adapted.values()])
        settings.target_modules = targets.layers
        settings.target_parameters = [*(config.target_parameters or []), *targets.parameters] or None
        settings.lora_dropout = 0.0
        settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    settings.rank_pattern = {
        re.escape(new): _of_layer(config.rank_pattern, name, config.r) for name, new in adapted.items()
    }
    settings.alpha_pattern = {
        re.escape(new): _of_layer(config.alpha_pattern, name, config.lora_alpha) for name, new in adapted.items()
    }
    if config.modules_to_save:
        ends = tuple(config.modules_to_save)
        settings.modules_to_save = [new for name, new in whole.items() if name.endswith(ends)] or config.modules_to_save
    renamed = {
        key: ROOT + names.get(module, module) + key.removeprefix(ROOT)[len(module) :] for key, module in old.items()
    }
    stored = {name.removesuffix(".weight") for name in matrices}
    layers, inside = [name for name, _ in model.named_modules()], text_part(model)
    missing = (
        _other_block(config, adapted, layers, asked)
        or _other_block(
            config, {name: name for name in stored}, [name.removesuffix(".weight") for name in base.tensors], asked
        )
        or _other_entry(config, {*adapted, *stored}, [name for name in layers if name.startswith(inside)])
    )
    return _Attempt(model, settings, {renamed[key]: tensor for key, tensor in rest.items()}, matrices, missing)


def _other_block(config: Any, adapted: Mapping[str, str], layers: Collection[str], asked: Sequence[Expression]) -> str:
    """A layer without tensors that differs from an adapted one (old name -> the model's) by the numbers of its block or expert
    alone, and that the settings call for too: its old name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    siblings, others = {_numberless(new): (old, new) for old, new in adapted.items()}, []
    for layer in layers:
        old, new = siblings.get(_numberless(layer), ("", ""))
        if not old or layer in adapted.values() or _NUMBER.findall(old) != _NUMBER.findall(new):
            continue  # of another kind, or the old name counts otherwise
        pieces = [*_NUMBER.split(old), ""]
        numbers = [*_NUMBER.findall(layer), ""]
        others.append("".join(f"{piece}{number}" for piece, number in zip(pieces, numbers, strict=False)))
    refuse_endless(asked, others)
    return next((name for name in others if check_target_module_exists(config, name)), "")


def _other_entry(config: Any, adapted: Collection[str], layers: Collection[str]) -> str:
    """An entry of target_modules that the model has layers for, and none of them has tensors."""
    entries = () if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    for entry in entries if adapted else ():
        held = any(old == entry or old.endswith(f".{entry}") for old in adapted)
        if not held and any(layer.endswith(f".{entry}") for layer in layers):
            return str(entry)
    return ""


def _numberless(name: str) -> str:
    return _NUMBER.sub("*", name)


def _matrices(
    config: Any, tensors: Mapping[str, Tensor], base: Checkpoint, names: Collection[str]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Pairs of factors for matrices that the base stores and the model has no layer for, since it keeps a block's experts in one
    tensor; and the other tensors."""
    rest, taken = dict(tensors), {}
    for key in tensors:
        module = _module_of(key)
        pair = [f"{ROOT}{module}.lora_{side}.weight" for side in "AB"]
        single = module not in names and f"{module}.weight" in base.tensors
        if key == pair[0] and pair[1] in tensors and single and not config.use_dora and not config.lora_bias:
            a, b = (rest.pop(each) for each in pair)
            alpha = _of_layer(config.alpha_pattern, module, config.lora_alpha)
            scale = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
            taken[f"{module}.weight"] = LowRank(a, b, scale)
    return taken, rest


def _of_layer(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a layer, by peft's rule."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), default)


def _module_of(key: str) -> str:
    """The module that a tensor of an adapter is for."""
    stem, factor, _ = key.removeprefix(ROOT).partition(".lora_")
    return (stem if factor else stem.rpartition(".")[0]).removesuffix(".base_layer")


class MisfitError(Exception):
    """What of an adapter does not fit a model."""


def put_in(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """peft's model with the adapter in it. Raises MisfitError unless every layer that the settings name has its tensors, and every
    tensor its layer."""
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    known = {name for name, _ in model.named_modules()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fill_hollow(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, copy.deepcopy(config), NAME, low_cpu_mem_usage=True)
            loaded = set_peft_model_state_dict(wrapped, dict(tensors), NAME, low_cpu_mem_usage=True)
    except KeyError as error:  # peft looks up what it is to have, by name
        reason = _lacking(tensors, known) or _resized(tensors, shapes)
        missing = str(error.args[0] if error.args else error).removeprefix(ROOT)
        raise MisfitError(
            reason or f"holds no {missing!r}, which its settings call for; the file is incomplete"
        ) from None
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, AssertionError) as error:
        reason = _lacking(tensors, known) or _resized(tensors, shapes)
        raise MisfitError(reason or f"does not fit the base: {first_line(error)}") from None
    if loaded.unexpected_keys:
        reason = f"holds tensor {loaded.unexpected_keys[0]!r}, which its settings or the base have no layer for"
        raise MisfitError(_lacking(tensors, known) or reason)
    empty = [name for name, parameter in wrapped.named_parameters() if parameter.is_meta]
    if empty:
        raise MisfitError(
            f"holds no {empty[0].removeprefix(ROOT)!r}, which its settings call for; the file is incomplete"
        )
    return wrapped


def _lacking(tensors: Mapping[str, Tensor], known: Collection[str]) -> str | None:
    """The first layer that the adapter has tensors for and the model lacks."""
    for key in tensors:
        module = _module_of(key)
        if ".lora_" in key and module not in known:
            near = suggestion(module, known)
            return f"adapts {module!r}, which the base lacks{near if 'did you mean' in near else ''}"
    return None


def _resized(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first tensor that the adapter stores whole in another shape than the model's."""
    for key, tensor in tensors.items():
        name = key.removeprefix(ROOT).replace(".base_layer", "")
        if name in shapes and shapes[name] != tuple(tensor.shape):
            return (
                f"stores {name!r} with the shape {list(tensor.shape)}, the base's is {list(shapes[name])}; where tokens were "
                "added before training, give a base that has them, or merge the adapter with peft and give that model"
            )
    return None
