"""The large model that a run's small ones shift while it decodes: where it is, what it must share with them, and how they are laid
together to be judged."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spunge.errors import RecipeError
from spunge.model.loading import Base, load_base, load_tokenizer
from spunge.recipe.decoding import shift_of
from spunge.recipe.schema import Recipe
from spunge.run.inputs import BaseInputs
from spunge.run.models import Model
from spunge.unlearning.gedi import GeDiSettings, codes_of

READS = ("model", "normalizer", "pre_tokenizer", "added_tokens")  # what says which tokens a text becomes


# A training's own model, whatever the trainings beside it become.
ALONE: dict[str, Any] = {"merge": None, "folder": None, "given": None, "expert": None, "apart": False}


def laid_together(large: Base, small: Base, model: Model, recipe: Recipe) -> tuple[Base, Any]:
    """A model as it is judged, and the handle that takes the small ones away again. small: the small base, which is kept.

    Raises RecipeError where the recipe does not decode.
    """
    from spunge.model.offsets import (
        Offsets,
        Shift,
        pairs_of,
    )  # brings transformers' classes, which a plan may do without

    decode, unlearn = recipe.decode, recipe.unlearn
    if decode is None:
        raise RecipeError("decode: missing; nothing is shifted without it")
    expert = None if model.expert is None else _changed(small, replace(model, trainings=(model.expert,), **ALONE))
    changed = [_changed(small, each) for each in model.shifting]
    codes = codes_of(unlearn, small.tokenizer) if isinstance(unlearn, GeDiSettings) else ()
    pairs = pairs_of(decode.kind, small.model, changed, expert, codes)
    offsets = Offsets(pairs, Shift(**shift_of(decode, unlearn, pairs)))
    own = None if small.positions is None else small.positions - max(map(len, codes), default=0)
    positions = [each for each in (large.positions, own) if each is not None]
    # Nothing may be laid over its weights: it has no names for them.
    combined = replace(
        large,
        names={},
        regions={},
        positions=min(positions, default=None),
        beside=tuple(offsets.models),
        every_place=bool(codes),
    )
    return combined, offsets.attach(large.model)


def _changed(small: Base, model: Model) -> Any:
    """The small base with a model's values, as a model of its own."""
    with model.laid_over(small):
        return copy.deepcopy(small.model)


def load_small(base: BaseInputs) -> Base:
    return load_base(base.folder, base.judged)


def refuse_other_tokens(base: BaseInputs) -> None:
    """Raises RecipeError where a large model does not read texts as the small one does: their logits are of other tokens."""
    decode = base.recipe.decode
    if decode is None:
        return
    if base.conversion is not None and base.conversion.gguf:
        raise RecipeError("model.path: beside decode a GGUF file's tokenizer is not compared; give a plain checkpoint")
    small, unlearn = base.tokenizer, base.recipe.unlearn
    if isinstance(unlearn, GeDiSettings):
        codes_of(unlearn, small)
    large = load_tokenizer(base.large_settings, base.large, "decode.path")
    if (differing := _differing(small, large)) is not None:
        raise RecipeError(
            f"decode.path: {decode.path!r} has another {differing} than model.path, so their logits are of other tokens; give a "
            "small model of the same family"
        )


def _differing(small: Any, large: Any) -> str | None:
    """What of two tokenizers differs; None where they read alike. Padding and chat templates may differ."""
    if small.get_vocab() != large.get_vocab():
        return "vocabulary"
    for one, other in zip(*(_reads(each) for each in (small, large)), strict=True):
        if one != other:
            return "tokenizer"
    if small.eos_token_id != large.eos_token_id or small.bos_token_id != large.bos_token_id:
        return "start or end token"
    return None


def _reads(tokenizer: Any) -> Sequence[Any]:
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__]
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    return [told.get(name) for name in READS]
