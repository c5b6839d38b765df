"""An adapter in its base's model: peft puts it into a model without memory, of the class and by the names that take all of it.

Which layers are adapted, how they are scaled and which way round they lie is peft's own doing.
"""

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spunge.errors import RecipeError, suggestion
from spunge.weights.adapted import NAME, fill_hollow
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.names import Layout, UnbuildableError, layout_of, module_names, skeletons, text_part

ROOT = "base_model.model."


def fitted(folder: Path, tensors: Mapping[str, Tensor], base: Checkpoint, who: str) -> tuple[Layout, Any]:
    """peft's model with the adapter in it, of the first class that takes all of it, and how that class takes the base.

    Raises RecipeError naming what fits nowhere. `who` begins its errors: the setting and the adapter's name.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    problems: list[str] = []
    try:
        for model, settings, named in _attempts(skeletons(base.folder), config, tensors):
            layout = layout_of(model, base)
            try:
                return layout, _put_in(model, settings, named)
            except _MisfitError as misfit:
                problems.append(str(misfit))
    except UnbuildableError as reason:
        raise RecipeError(
            f"{who} cannot be fitted to the base, of which transformers builds no model ({reason}); merge it with peft and give "
            "that model"
        ) from None
    raise RecipeError(f"{who} {problems[0]}")


def _attempts(
    makers: Sequence[Callable[[], nn.Module]], config: Any, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, Any, Mapping[str, Tensor]]]:
    """What may fit together: a model, settings and tensors; the adapter as it is, before its layers get the model's names."""
    for make in makers:
        yield make(), config, tensors
    for make in makers if config.peft_type == "LORA" else ():
        model = make()
        settings, renamed = _renamed(model, config, tensors)
        if renamed.keys() != tensors.keys():
            yield model, settings, renamed


def _renamed(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A LoRA whose layers have other names than the model's (those of an older transformers, or of the base's files), by the
    model's: each layer with its own rank and alpha, as the settings say for it under its old name."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    old = {key: _module_of(key) for key in tensors}
    names = module_names(model, dict.fromkeys(old.values()))
    adapted = {old[key]: names[old[key]] for key in tensors if ".lora_" in key and old[key] in names}
    whole = {old[key]: names[old[key]] for key in tensors if ".lora_" not in key and old[key] in names}
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    settings = copy.deepcopy(config)
    chosen = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    beyond = [name for name in chosen - set(adapted.values()) if name.startswith(text_part(model))]
    # They speak of the old names, or of other parts of a model too, of which the adapter was trained on the language part.
    if not chosen >= set(adapted.values()) or not beyond:
        settings.target_modules = set(adapted.values())
        settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    settings.rank_pattern = {
        re.escape(new): ranks.get(get_pattern_key(ranks, name), config.r) for name, new in adapted.items()
    }
    settings.alpha_pattern = {
        re.escape(new): alphas.get(get_pattern_key(alphas, name), config.lora_alpha) for name, new in adapted.items()
    }
    if config.modules_to_save:
        ends = tuple(config.modules_to_save)
        settings.modules_to_save = [new for name, new in whole.items() if name.endswith(ends)] or config.modules_to_save
    renamed = {
        key: ROOT + names.get(module, module) + key.removeprefix(ROOT)[len(module) :] for key, module in old.items()
    }
    return settings, {renamed[key]: tensor for key, tensor in tensors.items()}


def _module_of(key: str) -> str:
    """The module that a tensor of an adapter is for."""
    stem, factor, _ = key.removeprefix(ROOT).partition(".lora_")
    return (stem if factor else stem.rpartition(".")[0]).removesuffix(".base_layer")


def _first_line(error: BaseException) -> str:
    """Its first line that says something; torch begins with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)


class _MisfitError(Exception):
    """What of an adapter does not fit a model."""


def _put_in(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """peft's model with the adapter in it. Raises _MisfitError unless every layer that the settings name has its tensors, and every
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
    except (ValueError, KeyError, RuntimeError) as error:
        reason = _lacking(tensors, known) or _resized(tensors, shapes)
        raise _MisfitError(reason or f"does not fit the base: {_first_line(error)}") from None
    if loaded.unexpected_keys:
        reason = f"holds tensor {loaded.unexpected_keys[0]!r}, which its settings or the base have no layer for"
        raise _MisfitError(_lacking(tensors, known) or reason)
    empty = [name for name, parameter in wrapped.named_parameters() if parameter.is_meta]
    if empty:
        raise _MisfitError(
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
