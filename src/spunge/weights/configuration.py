"""Whether two models' configurations let the same weights mean the same: heads, activations, layer types, rotations.

Tensors of equal shapes can belong to other functions: 32 heads of 128 or 64 of 64. The configurations are read by
transformers, so that defaults are filled in and renamed fields are equal; what may differ is listed here, the rest is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from spunge.errors import RecipeError
from spunge.weights.checkpoint import Checkpoint, read_config
from spunge.weights.described import know_layers

# No part of the function that a model computes, or told by its weights themselves. Beside these: what generation reads.
_ASIDE = re.compile(
    r"(^|_)(name_or_path|version|dtype|architectures|model_type|auto_map|id2label|label2id|problem_type|implementation|"
    r"vocab_size|loss|coef|alpha_loss|jitter|jitter_noise|tp)(_|$)|^(use_cache|return_dict|is_encoder_decoder|gradient_.*|"
    r"tie_.*|task_specific_params|summary_.*|output_.*|unsloth_.*|chunk_size_feed_forward|slow_but_exact|use_flash_attn|"
    r".*_token_ids?|.*_token_index|.*dropout.*|.*pdrop|.*drop_rate|layerdrop|initializer.*|init_std|.*_init_std|"
    r"init_device|use_mamba.*|use_associative_scan)$"
)
_OF_QUANTISATION = ("quantization_config", "compression_config")
# What a fine-tune may have otherwise: longer texts, above all.
_MAY_DIFFER = re.compile(
    r"rope|rotary_emb_base|position_embeddings|n_positions|n_ctx|seq_len|max_position|window|eps$|epsilon$|nextn"
)
_STRUCTURE = re.compile(
    r"^(partial_rotary_factor|qk_rope_head_dim|no_rope.*|rope_interleave)$"
)  # among those of a rotation


class _Described(NamedTuple):
    """A configuration. `fields`: by their paths (text_config.hidden_act); `known`: those that its class declares."""

    kind: str
    fields: Mapping[str, Any]
    known: frozenset[str]


def compared(base: Checkpoint, other: Checkpoint, label: str) -> list[str]:
    """Notes on what may differ between a model's configuration and its base's.

    Raises RecipeError naming the first field that makes the same weights mean something else. Without config.json on either
    side nothing is compared.
    """
    if not all((each.folder / "config.json").is_file() for each in (base, other)):
        return []
    read = [_by_transformers(each) for each in (base, other)]
    if None in read:
        read = [_as_written(each) for each in (base, other)]
    ours, theirs = (each for each in read if each is not None)
    said: list[str] = []
    ignored = _of_generation()
    for path in sorted(ours.fields.keys() | theirs.fields.keys()):
        own, its = ours.fields.get(path), theirs.fields.get(path)
        last = path.rpartition(".")[2]
        if own == its or path.startswith(_OF_QUANTISATION) or _ASIDE.search(last) or last in ignored:
            continue
        if ours.kind != theirs.kind and (own is None or its is None):
            continue  # two kinds that share a class have fields of their own
        either = path in ours.known & theirs.known and own is not None and its is not None
        if either and (_STRUCTURE.search(last) or not _MAY_DIFFER.search(path)):
            raise RecipeError(
                f"{other.setting}: {label!r} has {path} {_short(its)} in its config.json, the base has {_short(own)}: the same "
                "weights mean something else there; give a model made from this base"
            )
        said.append(f"{path} {_short(its)} (base: {_short(own)})")
    if not said:
        return []
    return [f"config.json of {label!r} differs from the base's, which is kept: {', '.join(said)}"]


def _by_transformers(checkpoint: Checkpoint) -> _Described | None:
    """None where transformers does not know the kind, or refuses an entry: its configuration is then taken as it is written."""
    from transformers import AutoConfig

    know_layers(checkpoint.folder)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        fields = dict(_flat(json.loads(json.dumps(config.to_dict(), default=str))))
    except Exception:  # of strangers' configurations: whatever a class objects to
        return None
    return _Described(str(config.model_type), fields, frozenset(_declared(config, fields)))


def _declared(config: Any, fields: Mapping[str, Any]) -> Iterator[str]:
    """The paths whose first part its class declares, in nested configurations too; those of others are anybody's additions."""
    from transformers import PretrainedConfig

    for path in fields:
        owner, rest = config, path
        while isinstance(inner := vars(owner).get(rest.partition(".")[0]), PretrainedConfig):
            owner, rest = inner, rest.partition(".")[2]
        if rest.partition(".")[0] in type(owner).__dataclass_fields__:
            yield path


def _as_written(checkpoint: Checkpoint) -> _Described:
    content = read_config(checkpoint.folder, checkpoint.setting)
    fields = dict(_flat(content))
    return _Described(str(content.get("model_type")), fields, frozenset(fields))


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _of_generation() -> frozenset[str]:
    """Old configurations hold what generation reads (temperature, max_length); it is not the weights'."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
