"""About what each stage takes: tokens through the whole model, and bytes read or written. For plans, not for comparing."""

from spunge.data.items import Items
from spunge.data.samples import Samples
from spunge.model.loading import model_depth
from spunge.registry import EVALUATORS, METHODS
from spunge.run.graph import Cost
from spunge.run.judge import Judging
from spunge.run.models import Lineup, Training
from spunge.unlearning.loop import TrainingSettings
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import written_bytes

LETTERS_PER_TOKEN = 4


def training_steps(training: Training, line: Lineup) -> int:
    """Optimizer steps of a training."""
    unlearn = line.inputs.recipe.unlearn
    if not isinstance(unlearn, TrainingSettings):
        return 0
    return sum(unlearn.steps_of({part.value: len(part.samples) for part in training.parts}).values())


def training_cost(training: Training, line: Lineup) -> Cost:
    inputs = line.inputs
    unlearn = inputs.recipe.unlearn
    if not isinstance(unlearn, TrainingSettings):
        return Cost()
    passes = METHODS.get(unlearn.method).passes
    length = min(_mean_tokens([part.samples for part in training.parts]), unlearn.max_length)
    samples = training_steps(training, line) * unlearn.batch_size * unlearn.accumulation
    return Cost(tokens=samples * length * passes(unlearn, model_depth(inputs.base.folder, inputs.recipe.model)))


def merging_cost(line: Lineup) -> Cost:
    checkpoint, unlearn = Checkpoint(line.inputs.base.folder), line.inputs.recipe.unlearn
    entries = METHODS.get(unlearn.method).stored_entries(unlearn, checkpoint)
    written = written_bytes(checkpoint, line.inputs.recipe.merge.dtype)
    return Cost(nbytes=(checkpoint.nbytes + written) / 2 + 8.0 * entries * len(line.models[-1].trainings))


def judging_cost(judging: Judging) -> Cost:
    return Cost(tokens=judging.items.table.nbytes / LETTERS_PER_TOKEN + _written_tokens(judging.items))


def _written_tokens(items: Items) -> int:
    """Tokens of the completions that an evaluation asks for, at most."""
    return int(items.table.num_rows) * EVALUATORS.get(items.settings.kind).written_tokens(items.settings)


def _mean_tokens(samples: list[Samples]) -> float:
    letters: int = sum(each.table.nbytes for each in samples)
    return letters / LETTERS_PER_TOKEN / max(1, sum(len(each) for each in samples))
