"""A recipe's model as an estimator needs it: from its configuration and its tokenizer."""

from typing import Any

import torch

from spunge.model.loading import pick_dtype, positions_of
from spunge.recipe.decoding import DExperts, GeDi, through_sum
from spunge.recipe.model import ModelSettings
from spunge.run.inputs import BaseInputs
from spunge.run.planning.devices import Device, spread_over
from spunge.run.planning.estimate import Beside, Estimator
from spunge.run.planning.skeleton import Skeleton
from spunge.weights.checkpoint import file_names
from spunge.weights.described import described_by
from spunge.weights.quantised import settled


def estimator_of(base: BaseInputs, device: Device, processes: int = 1) -> Estimator:
    """For a model that is here. processes: that train it together. Raises RecipeError where it cannot be read."""
    model, folder = base.recipe.model, base.untaught
    config = settled(described_by(folder, model.trust_remote_code), folder)
    small, judged, beside = skeleton_of(config, base.judged, device), None, None
    if (decode := base.recipe.decode) is not None:
        large = base.large_settings
        judged = skeleton_of(settled(described_by(base.large, large.trust_remote_code), base.large), large, device)
        # The small base, and what each offset is the difference to. A model of gedi is the difference of its own two readings.
        experts = isinstance(decode, DExperts) and decode.expert == "retain"
        offsets = 1 if decode.merge == "weights" else len(base.parts.parts)
        sorted_out = isinstance(decode, DExperts) and decode.top_p < 1
        beside = Beside(small, 1 + experts + offsets, offsets=offsets, nucleus=sorted_out)
        beside = Beside(small, offsets, 2) if isinstance(decode, GeDi) else beside
    # Where there is a configuration alone, every row is taken to be as long as it may be.
    named = [name for name in file_names(base.given, "model.path") if "token" in name or "vocab" in name]
    notes = set() if named else {"model.path: no tokenizer is there: every row is taken to be as long as max_length"}
    return Estimator(
        skeleton=skeleton_of(config, model, device),
        judged=judged or small,
        beside=beside,
        through=through_sum(base.recipe.decode),
        device=device,
        tokenizer=base.tokenizer if named else None,
        notes=notes,
        positions=positions_of(folder, model),
        train_in=model.train_in,
        processes=processes,
        spread=spread_over(base.judged.device_map, device),
    )


def skeleton_of(config: Any, model: ModelSettings, device: Device) -> Skeleton:
    # Of a card that is not here, no more is known than that it computes in bfloat16.
    where = torch.device("meta" if device.gpu else "cpu")
    dtype = pick_dtype(model.dtype, where, config)
    return Skeleton(config, dtype, model.trust_remote_code, model.checkpoint_activations, device.gpu, model.part)
