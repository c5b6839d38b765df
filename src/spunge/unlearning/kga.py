"""KGA, knowledge gap alignment (Wang et al. 2023, arXiv 2305.06535): know the forget samples as little as the base knows new ones.

Two copies of the base are trained further, A_f on the forget samples and A_n on new samples D_n. With A the model,

    gap = KL(base || A_n)                          mean over the tokens of D_n, once
    forget loss = | KL(A || A_f) - gap |           KL as the mean over the tokens of an optimizer step's batches
    retain loss = KL(base || A)

D_n should be data that the base has not seen. A recipe has none, so a share of the retain rows stands for it, and is then not
retained. The authors' code (github.com/Lingzhi-WANG/KGAUnlearn) trains A_f and A_n from the model that the base began as, and takes
the two divergences of the gap the other way round; here they are as the paper prints them. The retain term is their code's.

The new rows (`new_share`) are the same in all branches and controls of a run; where the base was trained on them, the gap is
smaller than the paper's. The authors' code takes the gap of a batch, not of all new rows. Its stop, once the loss is a share of
the first, is not there. alpha 0.1 is theirs; the copies' epochs and rates are ours. After a kill the copy of the forget samples
is trained again. With `accumulation`, and where a batch is taken in pieces, the distance from the gap is that of all the step's
tokens; they are read once more for it. No figure of the paper was measured again here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from spunge.data.arrays import dealt
from spunge.data.keeping import taken_apart
from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.model.memory import halved
from spunge.unlearning.calls import FORGET, Group, descending
from spunge.unlearning.copies import Further, further_steps, trained_further
from spunge.unlearning.feed import forget_stream, retain_stream, total_steps
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, retained_of
from spunge.unlearning.reference import base_outputs, outputs_with
from spunge.unlearning.scored import LogProbabilities, Scored, outputs
from spunge.unlearning.trained import evaluation_mode, stored_entries


class KGASettings(OutputSettings):
    method: str = "kga"
    copies: Further = Field(default=Further(), description="Training of the two copies.")
    new_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the retain rows that stand for data the base has not seen. They are drawn once a run, and are not "
        "retained.",
    )
    alpha: float = Field(0.1, ge=0, description="Weight of the retain term; 0 leaves it out.")
    retain_loss: Literal["kl"] = Field("kl", description="The divergence of the outputs from the base's.")


def unlearn(task: Task, settings: KGASettings) -> Branch:
    """Make the model as far from a copy that learned the forget samples as the base is from one that learned new ones."""
    rows = parted(retained_of(task), settings, task.common)
    forget, steps = forget_stream(task, settings), total_steps(task, settings)
    begun = task.state is not None and task.state.exists()  # then the gap is in the state
    gap = [] if begun else [gap_of(task, settings, rows.new)]
    with trained_further(task, settings, settings.copies, "copies", "copying-forget", steps) as copy:
        weights = [parameter.detach().clone() for parameter in copy.parameters]

    sides: list[float] = []  # on which side of the gap the batches of the step that is under way are, all together

    def loss(session: Session, batch: Batch) -> Tensor:
        known = session.memory["gap"]
        if not known:
            known += gap
        if batch.step and begins(batch):
            sides[:] = [math.copysign(1, divergence_of(session, weights, batch.step) - known[0])]
        other = outputs_with(session.trained, weights, batch)
        apart = divergence_from(session.outputs(batch), other.log_probabilities) - known[0]
        return sides[0] * apart if batch.step else apart.abs()

    retain = retain_stream(task, settings, rows.kept) if settings.alpha else None
    branch = descend(task, settings, loss, forget=forget, retain=retain, remembered=["gap"])
    told = f"{len(rows.new)} of {len(rows.new) + len(rows.kept)} retain rows"
    return replace(branch, notes={**branch.notes, "new data": told})


class Rows(NamedTuple):
    """The retain rows that stand for new data, and the others."""

    new: Samples
    kept: Samples


def parted(retain: Samples, settings: KGASettings, seed: int) -> Rows:
    """Raises RecipeError where there are too few."""
    count = len(retain)
    if count < 2:
        raise RecipeError(
            f"retain: {count} row, and kga takes a share of them for new data (unlearn.new_share); give at least two"
        )
    chosen = new_rows(count, settings)
    pieces = dealt(count, [chosen], np.random.default_rng(seed))
    return Rows(*(Samples(taken_apart(retain.table, rows)) for rows in pieces))


def new_rows(count: int, settings: KGASettings) -> int:
    """How many of so many retain rows stand for new data."""
    return min(count - 1, max(1, round(settings.new_share * count)))


def gap_of(task: Task, settings: KGASettings, new: Samples) -> float:
    """KL(base || A_n), mean over the tokens of the new samples."""
    own = replace(task, parts={"retain": new}, seeds={"retain": task.seed}, retain=None)
    stream, size = forget_stream(own, settings), settings.batch_size
    groups = (range(start, min(start + size, stream.count)) for start in range(0, stream.count, size))
    steps, setting = total_steps(task, settings), f"{task.setting}.max_length"
    with trained_further(own, settings, settings.copies, "copies", "copying-new", steps) as copy:

        def summed(rows: Sequence[int]) -> tuple[float, int]:
            batch = stream.batch(rows)
            base = base_outputs(copy, batch)
            far = outputs(copy.model, batch).divergences(base.log_probabilities)
            return float(far.sum()), far.numel()

        with torch.no_grad(), evaluation_mode(copy.model), task.base.autocast():
            each = [given for _, given in halved(groups, stream.longest, summed, setting)]
    return sum(far for far, _ in each) / max(1, sum(count for _, count in each))


def begins(batch: Batch) -> bool:
    """Whether it is the first batch, or piece, of its optimizer step."""
    first = batch.step[0]
    return (batch.rows, batch.start) == (first.rows, first.start)


def divergence_of(session: Session, weights: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """KL(A || A_f), mean over all their tokens, without gradient and without dropout."""
    far, count = 0.0, 0
    with torch.no_grad(), evaluation_mode(session.trained.model):
        for batch in (each for each in batches if each.counts):
            scored, other = session.outputs(batch), outputs_with(session.trained, weights, batch)
            far += float(divergence_from(scored, other.log_probabilities)) * batch.learned
            count += batch.learned
    return far / max(1, count)


def divergence_from(scored: Scored, other: LogProbabilities) -> Tensor:
    """Scalar: the mean over tokens of KL(this model || other)."""

    def loss(logits: Tensor, places: slice) -> Tensor:
        logs = logits.log_softmax(-1)
        return (logs.exp() * (logs - other(places))).sum(-1)

    return scored.mean_of(scored.each(loss))


def refuse(_parts: Mapping[str, Samples], retain: Samples | None, settings: KGASettings) -> None:
    """Raises RecipeError where there are no rows to take for new ones."""
    if retain is not None:
        parted(retain, settings, 0)


def calls(settings: KGASettings, _depth: int) -> list[Group]:
    return descending(settings, (FORGET._replace(gradient=False), FORGET._replace(beside=True)))


def copying(settings: KGASettings, rows: Mapping[str, int], retain: int) -> int:
    """Steps of both copies."""
    each = (rows, {"retain": new_rows(retain, settings)})
    return sum(further_steps(settings, settings.copies, learned) for learned in each)


KGA = Method(
    settings=KGASettings,
    version=2,  # the distance from the gap is that of all batches of a step
    source="Wang et al. 2023, arXiv 2305.06535",
    unlearn=unlearn,
    calls=calls,
    copying=copying,
    copies=1,  # the values of the copy that learned the forget samples
    stored_entries=stored_entries,
    refuse=refuse,
    needs_retain=lambda settings: True,
)
