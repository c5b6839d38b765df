"""SKU, selective knowledge negation unlearning (Liu et al. 2024, arXiv 2402.10058, section 3): acquire, then negate.

Stage 1 trains a copy of the base to be harmful, with

    loss = guided * L_GD + random * L_RD + preserve * L_PD
    L_GD = mean over samples of the answer's NLL to its own prompt
    L_RD = the same for k answers of other prompts, drawn at random, to that prompt
    L_PD = -KL(base || trained), mean over the retain samples' tokens, each token's held at max_divergence

and stage 2 subtracts what it learned: theta = theta_0 - strength * (theta_1 - theta_0).

Weight decay 0 and a linear schedule are as published. The answers' tokens alone are learned, all of them. The authors' code
(github.com/franciscoliu/SKU) joins rows as `### Question: ...` and `### Answer: ...` (so do the recipes `sku-llama2` and
`sku-opt`, by a template) and pads to the tokenizer's `model_max_length`. Where the tokenizer has one, L_GD there begins at a
place in the padding; where it has none, it leaves out the first two predictions of each answer and divides by one more than the
tokens. Its L_RD is on prompt and answer, its L_PD over padding, and nothing bounds that. None of it is copied here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from spunge.data.samples import IGNORED, Answer, Batch, Samples, collate
from spunge.errors import RecipeError
from spunge.recipe.training import Everything, LoRA, Trainable
from spunge.unlearning.batches import Stream, answered, samples_of, share
from spunge.unlearning.calls import FORGET, RETAIN, Group
from spunge.unlearning.feed import forget_stream, retain_stream, total_steps
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.reference import base_outputs
from spunge.unlearning.refusals import refuse_plain, refuse_plain_parts
from spunge.unlearning.scored import Scored, outputs
from spunge.unlearning.trained import Trained, stored_entries, training, training_mode

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"trainable": LoRA(rank=32, alpha=16, dropout=0.0, targets=["q_proj", "v_proj"])},
    "llama-2-13b": {"trainable": LoRA(rank=16, alpha=8, dropout=0.0, targets=["q_proj", "v_proj"])},
    "opt-2.7b": {"trainable": Everything(), "guided": 2.5, "random": 2.5, "learning_rate": 2e-4},
}


class SKUSettings(TrainingSettings):
    method: str = "sku"
    preset: Literal["llama-2-7b", "llama-2-13b", "opt-2.7b"] | None = Field(
        None, description="The published settings of a model: trainable, and OPT's own weights and learning rate."
    )
    guided: float = Field(0.5, ge=0, description="epsilon 1, weight of the guided distortion term.")
    random: float = Field(1.0, ge=0, description="epsilon 2, weight of the random disassociation term.")
    preserve: float = Field(1.0, ge=0, description="epsilon 3, weight of the preservation divergence term.")
    answers: int = Field(5, ge=1, description="k: random answers to each prompt.")
    max_divergence: float = Field(
        5.0, gt=0, description="Nats a token; the divergence on retain tokens is pushed no further."
    )
    strength: float = Field(1.0, gt=0, description="lambda: how much of what was learned is subtracted.")
    trainable: Trainable = Field(
        default=LoRA(rank=32, alpha=16, dropout=0.0), description="What is trained. Default: LoRA as for Llama-2-7b."
    )
    batch_size: int = Field(2, ge=1, description="Forget samples a step.")
    steps: int | None = Field(1000, ge=1, description="Optimizer steps for each part.")
    learning_rate: float = Field(2e-5, gt=0, description="Of the optimizer.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Of the learning rate, down to 0.")

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return {**PRESETS[values["preset"]], **values}
        return values


def calls(settings: SKUSettings, _depth: int) -> list[Group]:
    guided = [FORGET] if settings.guided else []
    base = RETAIN._replace(gradient=False, everywhere=True)
    return [(*guided, FORGET._replace(samples=settings.answers), base, base._replace(gradient=True, beside=True))]


def unlearn(task: Task, settings: SKUSettings) -> Branch:
    """Train a harmful copy that leaves normal answers alone, then subtract it (selective knowledge negation)."""
    if task.retain is None:
        raise RecipeError("retain: missing, and SKU needs normal prompts; add retain.source")
    forget, retain = forget_stream(task, settings), retain_stream(task, settings, task.retain)
    answers = Answers.of(forget, settings, task.seed)
    with training(task.base, settings.trainable, task.seed, common=task.common) as trained:

        def next_loss(_number: int) -> Loss:
            batch, held = next(forget), next(retain)
            own = share(batch, samples_of)  # each sample has as many answers as any other
            read = share(held, _read)
            terms = {
                "guided": _guided(trained, batch, settings) * own,
                "random": _sample_mean(outputs(trained.model, answers.mismatched(batch, forget.drawn))) * own,
                "preserve": -_divergence(trained, held, settings) * read,
            }
            weights = {"guided": settings.guided, "random": settings.random, "preserve": settings.preserve}
            total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            return Loss(total, {name: float(term.detach()) for name, term in terms.items()})

        steps = total_steps(task, settings)
        as_saved = partial(trained.as_saved, -settings.strength)
        loop = Loop(task, settings, trained.parameters, next_loss, steps, [forget, retain], as_saved=as_saved)
        with training_mode(trained.model):
            history = loop.run()
        changes = trained.changes(-settings.strength)
    return Branch(changes, history.steps, history.losses, history.stopped, history.notes, history.watched)


@dataclass(frozen=True)
class Answers:
    """The forget samples' prompts and answers, to be mixed."""

    samples: Samples
    answers: list[Answer]  # of the samples
    lengths: Sequence[int]  # most tokens of each row's prompt with an answer
    tokenizer: Any
    settings: SKUSettings
    seed: int

    @classmethod
    def of(cls, forget: Stream, settings: SKUSettings, seed: int) -> "Answers":
        """Raises RecipeError for plain texts, and where there is no other answer to draw."""
        samples, tokenizer = forget.samples, forget.base.tokenizer
        refuse_plain(samples, settings.method)
        answers = samples.answers()
        if all(answer == answers[0] for answer in answers):
            raise RecipeError("forget: SKU draws answers of other prompts, and all rows have the same; add rows")
        return cls(samples, answers, forget.lengths, tokenizer, settings, seed)

    def mismatched(self, batch: Batch, turn: int) -> Batch:
        """Each prompt of a batch with k random answers; `turn` decides which, for all rows that were drawn together."""
        generator = np.random.default_rng([self.seed, turn])
        drawn = [(row, self._others(row, generator)) for row in batch.drawn or batch.rows]
        mine = drawn[batch.start : batch.start + len(batch.rows)]
        pairs = [(row, self.answers[other]) for row, others in mine for other in others]
        return collate(answered(self.samples, pairs, self.tokenizer, self.lengths), batch.ids.device)

    def _others(self, own: int, generator: np.random.Generator) -> list[int]:
        """k rows whose answer is not the row's own."""
        chosen: list[int] = []
        while len(chosen) < self.settings.answers:
            row = int(generator.integers(0, len(self.answers)))
            if self.answers[row] != self.answers[own]:
                chosen.append(row)
        return chosen


def _sample_mean(scored: Scored) -> Tensor:
    """Mean over samples of their mean NLL."""
    return scored.sample_mean(scored.losses())


def _guided(trained: Trained, batch: Batch, settings: SKUSettings) -> Tensor:
    if not settings.guided:
        return torch.zeros((), device=batch.ids.device)
    return _sample_mean(outputs(trained.model, batch))


def _divergence(trained: Trained, held: Batch, settings: SKUSettings) -> Tensor:
    """KL(base || trained) on the retain batch, mean over its tokens."""
    held = held._replace(labels=torch.where(held.mask == 1, held.ids, IGNORED))
    each = outputs(trained.model, held).divergences(base_outputs(trained, held).log_probabilities)
    return each.clamp(max=settings.max_divergence).mean()


def _read(batch: Batch) -> float:
    """Tokens that the divergence is the mean over."""
    return float(batch.mask[:, 1:].sum())


SKU = Method(
    settings=SKUSettings,
    source="Liu et al. 2024, arXiv 2402.10058",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    refuse=refuse_plain_parts,
    needs_retain=lambda settings: True,
    shares=True,
    version=3,
)
