"""A task's streams of batches, with the lengths, sizes and seeds that its settings give them."""

from spunge.data.samples import Samples, union
from spunge.unlearning.batches import Stream
from spunge.unlearning.lengths import Lengths, Run
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.method import Task


def part_stream(task: Task, settings: TrainingSettings, value: str) -> Stream:
    """One part's samples."""
    return Stream(
        task.parts[value],
        task.base,
        settings.batch_size,
        settings.length_of(value),
        task.seeds[value],
        packing=settings.packing,
        accumulation=settings.accumulation,
    )


def forget_stream(task: Task, settings: TrainingSettings, repeats: int = 1) -> Stream:
    """The samples of all of a task's parts, shuffled together. repeats: steps in a row that are given the same."""
    lengths = Lengths(Run(settings.length_of(value), len(samples)) for value, samples in task.parts.items())
    return Stream(
        union(task.parts),
        task.base,
        settings.batch_size,
        lengths,
        task.seed,
        packing=settings.packing,
        accumulation=settings.accumulation,
        repeats=repeats,
    )


def retain_stream(task: Task, settings: TrainingSettings, retain: Samples) -> Stream:
    """The retain samples."""
    return Stream(
        retain,
        task.base,
        settings.retain_batch_size or settings.batch_size,
        settings.length_of("retain"),
        task.seed,
        order=settings.retain_order,
        packing=settings.packing and retain.plain,
        accumulation=settings.accumulation,
    )


def total_steps(task: Task, settings: TrainingSettings) -> int:
    """Optimizer steps of a task whose parts are trained as one."""
    return sum(settings.steps_of({value: len(samples) for value, samples in task.parts.items()}).values())
