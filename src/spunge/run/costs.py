"""About what each stage takes: tokens through the whole model, and bytes read or written. For plans, not for comparing."""

import math

from spunge.data.items import Items
from spunge.data.samples import Samples
from spunge.model.loading import model_depth
from spunge.registry import EVALUATORS, METHODS
from spunge.run.calibrate import Calibration
from spunge.run.graph import Cost
from spunge.run.inputs import BaseInputs
from spunge.run.judge import Judging
from spunge.run.models import Lineup, Training
from spunge.run.teach import Teaching
from spunge.run.watching import curves_of, steps_between
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.trained import entries_of, step_passes
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import written_bytes

LETTERS_PER_TOKEN = 4
DELTA = 4  # bytes of an entry: float32
STATE = 16  # bytes of an entry: its value, its last good one and Adam's two moments


def training_steps(training: Training, line: Lineup) -> int:
    """Optimizer steps of a training."""
    unlearn = line.inputs.unlearn
    if not isinstance(unlearn, TrainingSettings):
        return 0
    return sum(unlearn.steps_of({part.value: len(part.samples) for part in training.parts}).values())


def training_cost(training: Training, line: Lineup) -> Cost:
    inputs = line.inputs
    unlearn = inputs.unlearn
    entries = METHODS.get(unlearn.method).stored_entries(unlearn, Checkpoint(inputs.base.untaught))
    if not isinstance(unlearn, TrainingSettings):
        return Cost(kept=DELTA * entries)
    passes = METHODS.get(unlearn.method).passes
    length = min(_mean_tokens([part.samples for part in training.parts]), unlearn.max_length)
    samples = training_steps(training, line) * unlearn.batch_size * unlearn.accumulation
    tokens = samples * length * passes(unlearn, model_depth(inputs.base.untaught, inputs.recipe.model))
    watch, watched = inputs.recipe.watch, measurements(training, line) * _watched_tokens(training, line)
    best = 2 * DELTA if watch is not None and watch.chooses else 0
    return Cost(tokens=tokens, watched=watched, kept=DELTA * entries, passing=(STATE + best) * entries)


def measurements(training: Training, line: Lineup) -> int:
    """How often a training is measured on its way."""
    if line.inputs.recipe.watch is None:
        return 0
    return 1 + math.ceil(training_steps(training, line) / steps_between(training, line.inputs))


def _watched_tokens(training: Training, line: Lineup) -> float:
    """Of one measurement; each evaluation is asked once."""
    items = {curve.items.name: curve.items for curve in curves_of(training, line.inputs)}
    letters: int = sum(each.table.nbytes for each in items.values())
    return letters / LETTERS_PER_TOKEN + sum(map(_written_tokens, items.values()))


def teaching_steps(teaching: Teaching) -> int:
    """Optimizer steps of a teaching."""
    return teaching.settings.steps_for(len(teaching.samples))


def teaching_cost(teaching: Teaching, base: BaseInputs) -> Cost:
    settings, checkpoint = teaching.settings, Checkpoint(base.untaught)
    entries = entries_of(settings.trainable, checkpoint)
    length = min(_mean_tokens([teaching.samples]), settings.max_length)
    samples = teaching_steps(teaching) * settings.batch_size * settings.accumulation
    kept = written_bytes(checkpoint, settings.dtype)
    passing = (STATE + DELTA) * entries
    return Cost(tokens=samples * length * step_passes(settings.trainable), nbytes=kept, kept=kept, passing=passing)


def merging_cost(line: Lineup) -> Cost:
    checkpoint, unlearn = Checkpoint(line.inputs.base.untaught), line.inputs.unlearn
    entries = METHODS.get(unlearn.method).stored_entries(unlearn, checkpoint)
    written = written_bytes(checkpoint, line.inputs.base.own_dtype(line.inputs.recipe.merge.dtype))
    nbytes = (checkpoint.nbytes + written) / 2 + 8.0 * entries * len(line.models[-1].trainings)
    return Cost(nbytes=nbytes, kept=written)


def calibration_cost(calibration: Calibration) -> Cost:
    """Every try lays the model together and measures it."""
    line, tries = calibration.lineup, calibration.settings.tries
    letters = sum(items.table.nbytes for items in calibration.kept.items)
    written = sum(_written_tokens(items) for items in calibration.kept.items)
    tokens = letters / LETTERS_PER_TOKEN + written
    if calibration.model.name == "base":
        return Cost(tokens=tokens)
    entries = METHODS.get(line.inputs.unlearn.method).stored_entries(
        line.inputs.unlearn, Checkpoint(line.inputs.base.untaught)
    )
    return Cost(tokens=tries * tokens, nbytes=tries * 8.0 * entries * len(calibration.model.trainings))


def conversion_cost(base: BaseInputs) -> Cost:
    """What is quantised takes more than this once it is not."""
    return Cost(kept=sum(file.stat().st_size for file in base.conversion.files) if base.conversion else 0)


def judging_cost(judging: Judging) -> Cost:
    letters, written = judging.items.table.nbytes, _written_tokens(judging.items)
    return Cost(
        tokens=letters / LETTERS_PER_TOKEN + written, kept=letters + LETTERS_PER_TOKEN * written if written else 0
    )


def _written_tokens(items: Items) -> int:
    """Tokens of the completions that an evaluation asks for, at most."""
    return int(items.table.num_rows) * EVALUATORS.get(items.settings.kind).written_tokens(items.settings)


def _mean_tokens(samples: list[Samples]) -> float:
    letters: int = sum(each.table.nbytes for each in samples)
    return letters / LETTERS_PER_TOKEN / max(1, sum(len(each) for each in samples))
