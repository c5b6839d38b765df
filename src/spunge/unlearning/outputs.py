"""What the methods that work on the model's outputs share: gamma * forget loss + alpha * retain loss, and the base beside.

Where the recipe has `decouple` rows, SafeEraser's prompt-decouple loss (Chen et al. 2025, arXiv 2502.12520) is added:

    ... + decouple * NLL(ordinary answer | prompt like one to forget, in a harmless setting)

the mean over the answers' tokens, so that the prompt's words alone do not become what is refused. Its authors' code has the weight
0.5 beside GA and GradDiff, whose retain term it halves too, and 1 beside KL and refusals.

A method gives its forget loss as a function of a batch; here are the retain loss, the reference, and the loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.recipe.training import LoRA, Trainable
from spunge.unlearning.batches import Stream, learned_tokens, share
from spunge.unlearning.feed import forget_stream, retain_stream, total_steps
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.reference import Live, Stored, Sums, trained_outputs
from spunge.unlearning.scored import LogProbabilities, Scored
from spunge.unlearning.trained import Trained, training, training_mode

FIRST = 5  # batches whose mean retain loss stands for the base's


class OutputSettings(TrainingSettings):
    """What every method that works on outputs can be told."""

    gamma: float = Field(1.0, ge=0, description="Weight of the forget term.")
    alpha: float = Field(1.0, ge=0, description="Weight of the retain term; 0 leaves it out.")
    retain_loss: Literal["nll", "kl"] = Field(
        "nll", description="nll: of the retain texts; kl: the divergence of the outputs from the base's on them."
    )
    reference: Literal["live", "stored"] = Field(
        "live",
        description="The base's distributions (kl and undial): from the same weights at every step, or computed once and "
        "stored on the disk, tokens * vocabulary * 4 bytes. Likelihoods of samples (npo, dpo, altpo, "
        "pdu) are computed once either way.",
    )
    gru: float | None = Field(
        None,
        gt=0,
        le=1,
        description="GRU: the steps are on the forget term alone, without what would raise the retain loss. Share of a step in the "
        "running mean of retain gradients that tells this; published: 0.8. Default: both terms are added.",
    )
    decouple: float = Field(
        0.5, gt=0, description="Weight of the prompt-decouple term, where the recipe has `decouple` rows (SafeEraser)."
    )
    trainable: Trainable = Field(default=LoRA(), description="What is trained.")
    epochs: float | None = Field(1.0, gt=0, description="Passes over each part's samples. Give this or steps.")
    learning_rate: float = Field(1e-4, gt=0, description="Of the optimizer.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")

    @model_validator(mode="after")
    def _something_to_hold(self) -> "OutputSettings":
        if self.gru is not None and not self.alpha:
            raise ValueError("gru: there is no retain term to hold (alpha is 0); give alpha, or leave gru out")
        return self


def needs_retain(settings: OutputSettings) -> bool:
    """Whether the recipe must have retain rows."""
    return settings.alpha > 0


@dataclass
class Session:
    """One branch in training, as a forget loss sees it."""

    task: Task
    settings: OutputSettings
    trained: Trained
    forget: Stream
    distributions: Live | Stored = field(init=False)
    sums: dict[int, Sums] = field(init=False)  # by the stream's id
    step: int = 0  # optimizer steps done
    memory: dict[str, list[float]] = field(
        default_factory=dict
    )  # of the method's own, by name; part of the saved state

    logged: dict[str, float] = field(default_factory=dict)  # terms of the method's own, of the batch that it is given

    def base_sums(self, stream: Stream, batch: Batch) -> Tensor:
        """(b,): the base's summed negative log-likelihood of each sample's scored tokens. Ask before the model's own outputs, which
        are held until their gradient is known."""
        return self.sums[id(stream)].of(batch)

    def outputs(self, batch: Batch, in_one: bool = False) -> Scored:
        """The trained model's outputs at the scored places of a batch. in_one: as of `scored.outputs`."""
        return trained_outputs(self.trained, batch, in_one)


ForgetLoss = Callable[[Session, Batch], Tensor]


class Term(NamedTuple):
    """The retain term of a batch."""

    loss: Tensor  # scalar, times what the batch counts for in its step
    level: float | Tensor  # what tells the damage: the retain samples' NLL a token, or their divergence from the base
    weight: float  # of the loss in the total
    logged: Mapping[str, float | Tensor] = {}  # beside it


RetainTerm = Callable[[Session, Batch], Term]


def descend(
    task: Task,
    settings: Any,
    forget_loss: ForgetLoss,
    *,
    over: Callable[[Batch], float] = learned_tokens,
    forget: Stream | None = None,
    retain: Stream | None = None,
    retain_term: RetainTerm | None = None,
    sums: Sequence[Stream] = (),
    distributions: Sequence[Stream] = (),
    remembered: Sequence[str] = (),
    stopping: Callable[[Session], Callable[[int], str | None]] | None = None,
    if_flat: str | None = None,
) -> Branch:
    """Train gamma * forget_loss + alpha * retain loss.

    over: of how many the forget loss of a batch is the mean. forget, retain: the streams to draw from, the task's samples by
    default. retain_term: in place of the one that the settings name. sums, distributions: streams of whose samples the losses ask
    the reference for. remembered: names of lists in the session's memory. stopping: asked before training for what tells after a
    step why the training ends there, if so. if_flat: what to do where no step's loss has a slope, for the error.
    """
    forget = forget or forget_stream(task, settings)
    if settings.alpha and retain is None:
        retain = retain_stream(task, settings, retained_of(task))
    decoupled = None if task.decouple is None else retain_stream(task, settings, task.decouple)
    kl = settings.retain_loss == "kl" and retain is not None
    first: list[float] = []
    with training(task.base, settings.trainable, task.seed, common=task.common) as trained:
        session = Session(task, settings, trained, forget)
        session.distributions = _distributions(session, [*distributions, *([retain] if kl and retain else [])])
        session.memory = {name: [] for name in remembered}
        memory: dict[str, list[float]] = {"first": first, **{f"base {number}": [] for number in range(len(sums))}}
        memory |= session.memory
        session.sums = {
            id(stream): Sums(trained, stream, memory[f"base {number}"]) for number, stream in enumerate(sums)
        }

        def forgotten(number: int) -> Loss:
            session.step = number // settings.accumulation
            batch = next(forget)
            loss = forget_loss(session, batch) * share(batch, over)
            return Loss(settings.gamma * loss, {"forget": loss.detach(), **session.logged})

        def kept(number: int) -> Loss:
            assert retain is not None
            session.step = number // settings.accumulation
            term = (retain_term or partial(_usual_term, retain))(session, next(retain))
            if len(first) < FIRST:
                first.append(float(term.level))
            damage = term.level - (0.0 if kl else sum(first) / len(first))
            return Loss(term.weight * term.loss, {"retain": term.loss.detach(), **term.logged}, damage)

        def answered(number: int) -> Loss:
            assert decoupled is not None
            batch = next(decoupled)
            loss = session.outputs(batch).mean() * share(batch, learned_tokens)
            return Loss(settings.decouple * loss, {"decouple": loss.detach()})

        def summed(terms: Sequence[Callable[[int], Loss]], number: int) -> Loss:
            whole = terms[0](number)
            for term in terms[1:]:
                loop.backward(whole.total)  # what it holds is freed before the next term holds as much
                other = term(number)
                damage = whole.damage if other.damage is None else other.damage
                whole = Loss(whole.total.detach() + other.total, {**whole.terms, **other.terms}, damage)
            return whole

        others = [term for term, stream in ((kept, retain), (answered, decoupled)) if stream is not None]
        next_loss = partial(summed, [forgotten, *others])
        streams = [stream for stream in (forget, retain, decoupled) if stream is not None]
        steps = total_steps(task, settings)
        as_saved = partial(trained.as_saved, 1.0)
        loop = Loop(
            task,
            settings,
            trained.parameters,
            next_loss,
            steps,
            streams,
            memory=memory,
            as_saved=as_saved,
            apart=(forgotten, partial(summed, others)) if others else None,
            gru=settings.gru,
        )
        if if_flat is not None:
            loop.if_flat = if_flat
        if stopping is not None:
            look = stopping(session)
            loop.should_stop = lambda: look(loop.step)
        with training_mode(trained.model):
            history = loop.run()
        return Branch(
            trained.changes(1.0), history.steps, history.losses, history.stopped, history.notes, history.watched
        )


def _usual_term(retain: Stream, session: Session, held: Batch) -> Term:
    """The retain samples' NLL, or their divergence from the base."""
    settings, kept = session.settings, session.outputs(held)
    kl = settings.retain_loss == "kl"
    loss = divergence(kept, session.distributions.log_probabilities(retain, held)) if kl else kept.mean()
    return Term(loss * share(held, learned_tokens), loss.detach(), settings.alpha)


def divergence(scored: Scored, base: LogProbabilities) -> Tensor:
    """Scalar: the mean over scored tokens of KL(base || trained)."""
    return scored.mean_of(scored.divergences(base))


def retained_of(task: Task) -> Samples:
    """A task's retain samples. Raises RecipeError where it has none."""
    if task.retain is None:
        raise RecipeError("retain: missing, and the retain term needs it; add retain.source, or set unlearn.alpha to 0")
    return task.retain


def _distributions(session: Session, streams: Sequence[Stream]) -> Live | Stored:
    if session.settings.reference == "live" or not streams:
        return Live(session.trained)
    kept = session.task.log or session.task.state
    folder = kept.parent if kept else None
    with session.task.base.autocast():
        return Stored(session.trained, streams, folder, session.settings.batch_size)
