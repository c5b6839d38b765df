"""What an adapter_config.json may say: the kinds of adapter and the fields that are understood. Anything else is refused."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.weights.checkpoint import ADAPTER, read_object
from spunge.weights.checkpoint import read_config as read_base_config
from spunge.weights.expressions import Expression, refuse_no_expressions
from spunge.weights.importing import import_peft

# Of no consequence for the weights, or read by peft itself when it puts the adapter into the model.
_COMMON = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config "
    "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern".split()
)
_OWN = {
    "LORA": "r lora_alpha lora_dropout fan_in_fan_out bias use_rslora rank_pattern alpha_pattern init_lora_weights "
    "trainable_token_indices use_dora lora_bias target_parameters ensure_weight_tying",
    "LOHA": "r alpha rank_dropout module_dropout use_effective_conv2d rank_pattern alpha_pattern init_weights",
    "LOKR": "r alpha rank_dropout rank_dropout_scale module_dropout use_effective_conv2d decompose_both decompose_factor "
    "rank_pattern alpha_pattern init_weights",
    "IA3": "feedforward_modules fan_in_fan_out init_ia3_weights",
    "VERA": "r projection_prng_key save_projection vera_dropout d_initial fan_in_fan_out bias init_weights",
    "OFT": "r oft_block_size module_dropout fan_in_fan_out bias init_weights coft eps block_share use_cayley_neumann "
    "num_cayley_neumann_terms",
}
KINDS = {kind: _COMMON | frozenset(fields.split()) for kind, fields in _OWN.items()}
_NUMBERS, _PATTERNS = {"r", "lora_alpha", "alpha"}, {"rank_pattern", "alpha_pattern"}
# Fields that name layers: a list of names, a regular expression, or nothing.
_NAMES = frozenset(
    "target_modules exclude_modules modules_to_save target_parameters feedforward_modules layers_pattern".split()
)
# How peft asks of a layer's name what stands in a field: a text of its own, and each text of a list or key of a mapping.
_ALONE = dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), "{}")
_LISTED = {
    "target_modules": r"(^|.*\.){}($|\..*)",  # with ensure_weight_tying
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    **dict.fromkeys(_PATTERNS, r"(.*\.)?({})$"),
}
# Ways to begin a LoRA that leave the base as it is. Of the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the adapter is a
# difference from a base that the initialisation changed.
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_TO_CONVERT = "save it with path_initial_model_for_weight_conversion, or merge it with peft and give that model"


def read_config(folder: Path, who: str) -> dict[str, Any]:
    """The settings. `who` begins the errors: the setting and the adapter's name.

    Raises RecipeError where they are no JSON object, or say something that is not understood, naming the field.
    """
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    content = read_object(folder / ADAPTER, who.partition(":")[0])
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(
            f"{who} is an adapter of peft_type {kind!r}; {', '.join(KINDS)} can be merged; merge it with peft "
            "and give that model"
        )
    usual = vars(PEFT_TYPE_TO_CONFIG_MAPPING[kind]())
    for field, value in content.items():
        if field not in KINDS[kind] and value not in (None, False, "", [], {}) and value != usual.get(field):
            raise RecipeError(
                f"{who} has {field}: {_short(value)} in its {ADAPTER}, which is not supported; merge it with peft "
                "and give that model"
            )
    for field in _NUMBERS & content.keys():
        if not _is_number(content[field]):
            raise RecipeError(f"{who} has {field}: {_short(content[field])} in its {ADAPTER}, which is no number")
    for field in _PATTERNS & content.keys():
        if not isinstance(content[field], Mapping):
            raise RecipeError(f"{who} has {field}: {_short(content[field])} in its {ADAPTER}; write {{}} for none")
        if not all(map(_is_number, content[field].values())):
            raise RecipeError(
                f"{who} has {field}: {_short(content[field])} in its {ADAPTER}, with values that are no numbers"
            )
    for field in _NAMES & content.keys():
        names = content[field]
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not isinstance(names, str) and not listed:
            raise RecipeError(f"{who} has {field}: {_short(names)} in its {ADAPTER}, which is no list of names")
    layers = content.get("layers_to_transform")
    if not all(type(layer) is int for layer in (layers if isinstance(layers, list) else [layers or 0])):
        raise RecipeError(
            f"{who} has layers_to_transform: {_short(layers)} in its {ADAPTER}, which are no layers' numbers"
        )
    refuse_no_expressions([*expressions(content, who)])
    start = content.get("init_lora_weights", True)
    if start not in STARTS:
        raise RecipeError(
            f"{who} has init_lora_weights: {start!r}, which changed the base before training; {_TO_CONVERT}"
        )
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not


def expressions(content: Mapping[str, Any], who: str) -> Iterator[Expression]:
    """All that peft takes for a regular expression."""
    for field in (_ALONE | _LISTED).keys() & content.keys():
        value = content[field]
        if isinstance(value, str) and field in _ALONE:
            yield Expression(_said(who, field, value), value, _ALONE[field], whole=True)
        elif field in _LISTED:
            for text in [value] if isinstance(value, str) else value or ():
                yield Expression(_said(who, field, text), text, _LISTED[field])


def _said(who: str, field: str, value: Any) -> str:
    return f"{who} has {field}: {_short(value)} in its {ADAPTER}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def other_base(config: Mapping[str, Any], base: Path, label: str) -> list[str]:
    """A note where the adapter says that it was trained on a base of another name."""
    named = str(config.get("base_model_name_or_path") or "")
    own = {base.resolve().name, *(part.removeprefix("models--") for part in base.resolve().parts if "--" in part)}
    own.add(_last(str(read_base_config(base).get("_name_or_path") or "")))
    if not named or {_last(named).lower(), named.replace("/", "--").lower()} & {name.lower() for name in own}:
        return []
    return [f"{label!r} was trained on the base {named!r} by its {ADAPTER}; it is applied to {base.resolve().name!r}"]


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
