"""About what each stage takes: steps, tokens through the whole model, bytes read or written. For plans, not for comparing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spunge.data.items import Items
from spunge.data.samples import Samples
from spunge.data.split import Part
from spunge.model.loading import embeddings_of, model_depth
from spunge.progress import Expected
from spunge.recipe.training import SAM, DescentSettings, Everything, stepper
from spunge.registry import EVALUATORS, METHODS
from spunge.run.calibrate import Calibration
from spunge.run.graph import Cost, Stage
from spunge.run.inputs import BaseInputs
from spunge.run.judge import Judging
from spunge.run.models import Lineup, Training
from spunge.run.planning.steps import Rows, Steps
from spunge.run.teach import Teaching
from spunge.run.train import undecided
from spunge.run.watching import curves_of, steps_between
from spunge.unlearning.calls import FORGET, RETAIN, Call, Group, Side
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.rmu.settings import RMUSettings
from spunge.unlearning.rmu.tuning import FACTORS, SHARES
from spunge.unlearning.rmu.tuning import STEPS as TRIAL_STEPS
from spunge.unlearning.trained import entries_of
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import written_bytes

LETTERS_PER_TOKEN = 4
DELTA = 4  # bytes of an entry: float32
WRITING = 4  # times what a token takes that is read: one that is written
STATE = 16  # bytes of an entry: its value, its last good one and Adam's two moments


def expected(stage: Stage[Any]) -> Expected:
    """What the others of a run are told of a stage that is to come: its passes of tokens through the model, or bytes."""
    cost = stage.takes
    tokens = cost.tokens + cost.watched + WRITING * (cost.written + cost.watched_written)
    tokens += sum(passes(each) for each in (cost.steps, cost.copying) if each is not None)
    tokens += sum(each.texts * each.tokens * (WRITING + each.again * each.read) for each in cost.first)
    return Expected(stage.title, "model", tokens) if tokens else Expected(stage.title, "disk", cost.nbytes)


def passes(steps: Steps) -> float:
    """About how many tokens go through the model while it trains; one with a gradient counts for three."""
    a_step = 0.0
    for call in (call for group in steps.groups for call in group if not call.once):
        rows = steps.rows[call.of]
        longest = sum(rows.lengths) / len(rows.lengths)
        tokens = min(longest, _letters(rows.samples) / LETTERS_PER_TOKEN / max(1, rows.count))
        a_step += rows.batch * call.samples * tokens * (3 if call.gradient else 1)
    return steps.count * steps.accumulation * a_step


def training_steps(training: Training, line: Lineup) -> int:
    """Optimizer steps of a training."""
    unlearn = training.settings(line.inputs.unlearn)
    if not isinstance(unlearn, TrainingSettings):
        return 0
    return sum(unlearn.steps_of({part.value: len(part.samples) for part in training.parts}).values())


def training_cost(training: Training, line: Lineup) -> Cost:
    inputs = line.inputs
    unlearn = training.settings(inputs.unlearn)
    entries = METHODS.get(unlearn.method).stored_entries(unlearn, Checkpoint(inputs.base.untaught))
    if not isinstance(unlearn, TrainingSettings):
        return Cost(kept=DELTA * entries)
    watch, count = inputs.recipe.watch, measurements(training, line)
    read, written = _watched_tokens(training, line)
    best = 2 * DELTA if watch is not None and watch.chooses else 0
    steps = steps_of(unlearn, training.parts, training_steps(training, line), line)
    method, batches = (
        METHODS.get(unlearn.method),
        sum(len(part.samples) for part in training.parts) / unlearn.batch_size,
    )
    over = steps.count * steps.accumulation / max(1, math.ceil(batches))
    rows = {part.value: len(part.samples) for part in training.parts}
    copying = method.copying(unlearn, rows, 0 if inputs.retain is None else len(inputs.retain))
    return Cost(
        steps=steps,
        copying=replace(steps, count=copying, groups=[(FORGET,)], further=0) if copying else None,
        first=[method.writing(part.samples, unlearn, over) for part in training.parts],
        watched=count * read,
        watched_written=count * written,
        kept=DELTA * entries,
        passing=(STATE + best) * entries + _stored_outputs(steps, inputs.base),
    )


def steps_of(unlearn: TrainingSettings, parts: Sequence[Part], count: int, line: Lineup) -> Steps:
    """The steps of a method on some parts."""
    inputs, method = line.inputs, METHODS.get(unlearn.method)
    depth, watch, retain = model_depth(inputs.base.untaught, inputs.recipe.model), inputs.recipe.watch, inputs.retain
    alone = method.last_block is not None and watch is None and not undecided(unlearn)
    last = method.last_block(unlearn, depth) if alone and method.last_block is not None else None
    forget = Rows(
        [part.samples for part in parts],
        [unlearn.length_of(part.value) for part in parts],
        unlearn.batch_size,
        unlearn.packing,
    )
    size = unlearn.retain_batch_size or unlearn.batch_size
    rows: dict[Side, Rows] = {"forget": forget}
    if retain is not None:
        rows["retain"] = Rows([retain], [unlearn.length_of("retain")], size, unlearn.packing and retain.plain)
    groups = [[call for call in group if call.of in rows] for group in method.calls(unlearn, depth)]
    # The prompt-decouple term's rows are about as long as those to retain, or to forget.
    beside: list[Group] = [] if inputs.decouple is None else [(RETAIN if retain is not None else FORGET,)]
    return Steps(
        count=count,
        accumulation=unlearn.accumulation,
        groups=[tuple(group) for group in groups if group] + beside + _again(unlearn, groups),
        what=dict(unlearn).get("trainable", Everything()),
        optimizer=stepper(unlearn.optimizer),
        rows=rows,
        further=further_copies(unlearn) + method.copies,
        keeps_good=unlearn.max_damage is not None and retain is not None,
        keeps_best=watch is not None and watch.chooses,
        blocks=None if last is None else last + 1,
    )


def _again(settings: DescentSettings, groups: Sequence[Sequence[Call]]) -> list[Group]:
    """The calls that SAM makes once more: those whose gradient is taken on the forget samples."""
    if not isinstance(settings.optimizer, SAM):
        return []
    again = [tuple(call for call in group if call.gradient and call.of == "forget") for group in groups]
    return [group for group in again if group]


def further_copies(settings: DescentSettings) -> int:
    """Float32 copies of what is trained, beside weights, gradients and the optimizer's state."""
    return isinstance(settings.optimizer, SAM) + 2 * (dict(settings).get("gru") is not None)


def _stored_outputs(steps: Steps, base: BaseInputs) -> float:
    """Bytes of the base's distributions, where they are stored before training."""
    stored = {call.of for group in steps.groups for call in group if call.once and any(each.beside for each in group)}
    if not stored:
        return 0.0
    texts = [samples for side in stored for samples in steps.rows[side].samples]
    return _letters(texts) / LETTERS_PER_TOKEN * embeddings_of(base.given, base.recipe.model) * DELTA


def settling_cost(line: Lineup) -> Cost:
    """Of the short trials that a method makes where its settings are `auto`."""
    unlearn = line.inputs.unlearn
    if not isinstance(unlearn, RMUSettings):
        return Cost()
    trials = (len(SHARES) if isinstance(unlearn.layer, str) else 1) + (len(FACTORS) - 1) * isinstance(
        unlearn.coefficient, str
    )
    return Cost(steps=steps_of(unlearn, line.inputs.parts.parts, trials * TRIAL_STEPS, line))


def measurements(training: Training, line: Lineup) -> int:
    """How often a training is measured on its way."""
    if line.inputs.recipe.watch is None:
        return 0
    return 1 + math.ceil(training_steps(training, line) / steps_between(training, line.inputs))


def _watched_tokens(training: Training, line: Lineup) -> tuple[float, float]:
    """Read and written, of one measurement; each evaluation is asked once."""
    items = {curve.items.name: curve.items for curve in curves_of(training, line.inputs)}
    letters: int = sum(each.table.nbytes for each in items.values())
    return letters / LETTERS_PER_TOKEN, sum(map(_written_tokens, items.values()))


def teaching_steps(teaching: Teaching) -> int:
    """Optimizer steps of a teaching."""
    return teaching.settings.steps_for(len(teaching.samples))


def teaching_cost(teaching: Teaching, base: BaseInputs) -> Cost:
    settings, checkpoint = teaching.settings, Checkpoint(base.untaught)
    entries = entries_of(settings.trainable, checkpoint)
    kept = written_bytes(checkpoint, settings.dtype)
    steps = Steps(
        count=teaching_steps(teaching),
        accumulation=settings.accumulation,
        groups=[(FORGET,)],
        what=settings.trainable,
        optimizer=stepper(settings.optimizer),
        rows={"forget": Rows([teaching.samples], [settings.max_length], settings.batch_size, settings.packing)},
        further=further_copies(settings),
        keeps_good=False,
        keeps_best=False,
    )
    return Cost(steps=steps, nbytes=kept, kept=kept, passing=(STATE + DELTA) * entries)


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
    tokens = letters / LETTERS_PER_TOKEN
    if calibration.model.name == "base":
        return Cost(tokens=tokens, written=written)
    entries = METHODS.get(line.inputs.unlearn.method).stored_entries(
        line.inputs.unlearn, Checkpoint(line.inputs.base.untaught)
    )
    return Cost(
        tokens=tries * tokens, written=tries * written, nbytes=tries * 8.0 * entries * len(calibration.model.trainings)
    )


def conversion_cost(base: BaseInputs) -> Cost:
    """What is quantised takes more than this once it is not."""
    return Cost(kept=sum(file.stat().st_size for file in base.conversion.files) if base.conversion else 0)


def judging_cost(judging: Judging) -> Cost:
    letters, written = judging.items.table.nbytes, _written_tokens(judging.items)
    kept = letters + LETTERS_PER_TOKEN * written if written else 0
    return Cost(tokens=letters / LETTERS_PER_TOKEN, written=written, kept=kept)


def _written_tokens(items: Items) -> int:
    """Tokens of the completions that an evaluation asks for, at most."""
    return int(items.table.num_rows) * EVALUATORS.get(items.settings.kind).written_tokens(items.settings)


def _letters(samples: Sequence[Samples]) -> float:
    return float(sum(each.table.nbytes for each in samples))
