"""About what each stage takes: tokens through the whole model, and bytes read or written. For plans, not for comparing."""

import fnmatch
from typing import Any

from spunge.data.items import Items
from spunge.data.samples import Samples
from spunge.model.architecture import DOWN_PROJECTIONS
from spunge.model.loading import model_depth
from spunge.registry import METHODS
from spunge.run.graph import Cost
from spunge.run.judge import Judging
from spunge.run.models import Lineup, Training
from spunge.weights.checkpoint import Checkpoint

LETTERS_PER_TOKEN = 4


def training_steps(training: Training, line: Lineup) -> int:
    """Optimizer steps of a training."""
    unlearn: Any = line.inputs.recipe.unlearn
    return sum(unlearn.steps_of({part.value: len(part.samples) for part in training.parts}).values())


def training_cost(training: Training, line: Lineup) -> Cost:
    inputs = line.inputs
    unlearn: Any = inputs.recipe.unlearn
    length = min(_mean_tokens([part.samples for part in training.parts]), unlearn.max_length)
    passes = METHODS.get(unlearn.method).passes(unlearn, model_depth(inputs.base.folder, inputs.recipe.model))
    tokens = training_steps(training, line) * unlearn.batch_size * unlearn.accumulation * length * passes
    return Cost(tokens=float(tokens))


def merging_cost(line: Lineup) -> Cost:
    checkpoint = Checkpoint(line.inputs.base.folder)
    branches = len(line.models[-1].trainings)
    return Cost(nbytes=checkpoint.nbytes + 8.0 * trained_entries(line.inputs.recipe.unlearn, checkpoint) * branches)


def judging_cost(judging: Judging) -> Cost:
    return Cost(tokens=judging.items.table.nbytes / LETTERS_PER_TOKEN + _written_tokens(judging.items))


def trained_entries(unlearn: Any, checkpoint: Checkpoint) -> int:
    """Entries that one branch trains: the factors of LoRA, the chosen tensors, or all; or brings, where nothing is trained."""
    if (stored := getattr(unlearn, "stored_entries", None)) is not None:
        return int(stored(checkpoint))
    what = getattr(unlearn, "trainable", None)
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    if what is None:
        sizes = [info.numel for info in matrices if any(f".{name}.weight" in info.name for name in DOWN_PROJECTIONS)]
        return sum(sorted(sizes)[-3:])
    if what.kind == "lora":
        named = what.targets if isinstance(what.targets, list) else ["q_proj", "v_proj", "query_key_value", "c_attn"]
        chosen = [
            info for info in matrices if what.targets == "all-linear" or any(f".{name}." in info.name for name in named)
        ]
        return sum(what.rank * sum(info.shape) for info in chosen)
    if what.kind == "tensors":
        return sum(i.numel for i in checkpoint.tensors.values() if any(fnmatch.fnmatch(i.name, p) for p in what.match))
    return sum(info.numel for info in checkpoint.tensors.values())


def _written_tokens(items: Items) -> int:
    """Tokens of the completions that an evaluation asks for, at most."""
    settings = getattr(items.settings, "generation", None)
    return items.table.num_rows * settings.samples * settings.max_new_tokens if settings else 0


def _mean_tokens(samples: list[Samples]) -> float:
    letters: int = sum(each.table.nbytes for each in samples)
    return letters / LETTERS_PER_TOKEN / max(1, sum(len(each) for each in samples))
