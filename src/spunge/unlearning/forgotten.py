"""When a sequence counts as forgotten (Jang et al. 2023, arXiv 2210.01504, section 3): the stop of gradient ascent.

Of a sequence of T tokens, with f(x_<t) what the model writes greedily after its first tokens, up to T in all,

    memorisation accuracy       MA   = 1/(T - 1)  sum over t of [the likeliest token after x_<t is x_t]
    extraction likelihood       EL_n = 1/(T - n)  sum over t <= T - n of overlap_n(f(x_<t), x_>=t)
    overlap_n(a, b) = share of the n-grams of a that stand in b

Ascent ends once the means of both over the forget samples are no greater than those of unseen texts under the base. Of a sample
with a prompt the answer's tokens alone are counted, and its prefixes begin with the prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pydantic import Field

from spunge.data.samples import IGNORED, Encoded
from spunge.errors import RecipeError
from spunge.recipe.block import Strict
from spunge.unlearning.batches import Stream
from spunge.unlearning.feed import retain_stream, total_steps
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.method import Task
from spunge.unlearning.trained import evaluation_mode


class ForgettingStop(Strict):
    """When ascent ends."""

    accuracy: float | None = Field(
        None, ge=0, le=1, description="Greatest memorisation accuracy. Default: the base's on retain rows."
    )
    extraction: float | None = Field(
        None, ge=0, le=1, description="Greatest extraction likelihood. Default: the base's on retain rows."
    )
    n: int = Field(10, ge=1, description="Tokens of the n-grams of extraction likelihood.")
    rows: int = Field(32, ge=1, description="Rows that either is measured on, of the forget and of the retain samples.")
    every: int | None = Field(None, ge=1, description="Steps between two looks. Default: those of an epoch.")


class Held(NamedTuple):
    """What a model holds of some samples."""

    accuracy: float
    extraction: float  # nan where no sample is longer than n tokens


def stop_of(
    task: Task, settings: TrainingSettings, stop: ForgettingStop, forget: Stream
) -> Callable[[int], str | None]:
    """Tells after a step why the training ends there, if so. To be called before training: it measures the base.

    Raises RecipeError where there are no retain rows to measure and no numbers are given.
    """
    if task.base.ranks.shared:
        raise RecipeError(
            f"{task.setting}.stop: a model that several processes train is not looked at on its way; leave it out"
        )
    limits = _limits(task, settings, stop, forget)
    steps = total_steps(task, settings)
    epoch = math.ceil(forget.count / (settings.batch_size * settings.accumulation))
    every = stop.every or min(epoch, steps)

    def look(step: int) -> str | None:
        if step % every:
            return None
        held = measured(task, forget, stop, limits.accuracy)
        if held.accuracy > limits.accuracy or held.extraction > limits.extraction:
            return None
        told = f"memorisation accuracy {held.accuracy:.3f} (at most {limits.accuracy:.3f})"
        if not math.isnan(held.extraction):
            told += f" and extraction likelihood {held.extraction:.3f} (at most {limits.extraction:.3f})"
        return f"{told} after step {step}"

    return look


def _limits(task: Task, settings: TrainingSettings, stop: ForgettingStop, forget: Stream) -> Held:
    accuracy, extraction = stop.accuracy, stop.extraction
    if accuracy is None or extraction is None:
        if task.retain is None:
            raise RecipeError(
                f"{task.setting}.stop: there are no retain rows to take the limits from; add retain.source, or give "
                f"{task.setting}.stop.accuracy and {task.setting}.stop.extraction"
            )
        unseen = measured(task, retain_stream(task, settings, task.retain), stop)
        accuracy = unseen.accuracy if accuracy is None else accuracy
        if extraction is None and math.isnan(unseen.extraction) and _any_long(forget, stop):
            raise RecipeError(
                f"{task.setting}.stop.n: {stop.n}: the limit of the extraction likelihood is that of the retain rows, and none of "
                f"them has more learned tokens than that; lower it, or give {task.setting}.stop.extraction"
            )
        extraction = unseen.extraction if extraction is None else extraction
    return Held(accuracy, extraction)


def measured(task: Task, stream: Stream, stop: ForgettingStop, accuracy: float = 1.0) -> Held:
    """Means over the first rows of a stream. Where the memorisation accuracy is above `accuracy`, nothing is written for the
    extraction likelihood, which is then 1."""
    base, rows = task.base, range(min(stop.rows, stream.count))
    samples = stream.encoded(rows)
    with torch.no_grad(), evaluation_mode(base.model), base.autocast(), greedily(base.model, base.tokenizer):
        held = sum(memorised(base.model, each) for each in samples) / len(samples)
        if held > accuracy:
            return Held(held, 1.0)
        likely = [value for each in samples if (value := extracted(base.model, each, stop.n)) is not None]
    return Held(held, sum(likely) / len(likely) if likely else math.nan)


def memorised(model: Any, sample: Encoded) -> float:
    """Share of the learned tokens that are the likeliest."""
    ids = torch.tensor([sample.ids], device=model.device)
    likeliest = model(input_ids=ids, use_cache=False).logits[0, :-1].argmax(-1).tolist()
    hits: list[bool] = [
        guess == label for guess, label in zip(likeliest, sample.labels[1:], strict=True) if label != IGNORED
    ]
    return sum(hits) / max(1, len(hits))


def _any_long(stream: Stream, stop: ForgettingStop) -> bool:
    """Whether some of the rows that are measured have an extraction likelihood."""
    samples = stream.encoded(range(min(stop.rows, stream.count)))
    return any(len(each.ids) - _first(each) > stop.n for each in samples)


def _first(sample: Encoded) -> int:
    """Where the learned tokens begin."""
    return next(place for place, label in enumerate(sample.labels) if label != IGNORED)


def extracted(model: Any, sample: Encoded, n: int) -> float | None:
    """EL_n of a sample; None where its learned tokens are n or fewer."""
    ids, first = sample.ids, _first(sample)
    starts = range(max(1, first), len(ids) - n + 1)
    if len(ids) - first <= n:
        return None
    overlaps = []
    for start in starts:
        given = torch.tensor([ids[:start]], device=model.device)
        written = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=len(ids) - start
        )
        overlaps.append(overlap(written[0, start:].tolist(), ids[start:], n))
    return sum(overlaps) / len(overlaps)


def overlap(written: Sequence[int], true: Sequence[int], n: int) -> float:
    """Share of the n-grams of what was written that stand in what is true; 0 where there are none."""
    grams = [tuple(written[at : at + n]) for at in range(len(written) - n + 1)]
    known = {tuple(true[at : at + n]) for at in range(len(true) - n + 1)}
    return sum(gram in known for gram in grams) / max(1, len(grams))


@contextmanager
def greedily(model: Any, tokenizer: Any) -> Iterator[None]:
    """Inside the block the model writes the likeliest token at each place and nothing ends it, whatever its checkpoint says."""
    from transformers import GenerationConfig

    before = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = before
