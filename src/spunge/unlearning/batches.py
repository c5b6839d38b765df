"""In what order samples reach a method: shuffled batches of one part, parts in turn, or all parts as one."""

from collections.abc import Iterator, Mapping

import pyarrow as pa

from spunge.models import Base
from spunge.texts import Batch, Samples, collate, encode, shuffled_batches
from spunge.unlearning.loop import TrainingSettings


def batches_of(samples: Samples, base: Base, settings: TrainingSettings, seed: int) -> Iterator[Batch]:
    """Batches on the base's device without end, in an order of the seed."""
    for rows in shuffled_batches(len(samples), settings.batch_size, seed):
        texts = samples.texts(rows, base.tokenizer)
        yield collate([encode(text, base.tokenizer, settings.max_length) for text in texts], base.device)


def interleaved(steps: Mapping[str, int]) -> list[str]:
    """The part of each step, every part's steps spread evenly: with equal numbers, one batch of each in turn."""
    places = [
        ((step + 0.5) / count, position, value)
        for position, (value, count) in enumerate(steps.items())
        for step in range(count)
    ]
    return [value for _, _, value in sorted(places)]


def union(parts: Mapping[str, Samples]) -> Samples:
    """The samples of all parts. A row of two parts stays twice, as the two branches together see it twice."""
    return Samples(pa.concat_tables([samples.table for samples in parts.values()]))
