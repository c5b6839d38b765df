"""GeDi (Krause et al. 2021, arXiv 2009.06367): a class-conditional model, which decodes by the class that a text is of.

The model reads every text after a control code. Rows to retain are of the desired class, rows to forget of the undesired one:

    loss = weight * L_g + (1 - weight) * L_d        mean over the samples of each class, either class counts half
    L_g = NLL(x | own code)                         mean over the tokens of the text
    L_d = -log P(own class | x)                     P = softmax over the two classes of -scale * NLL(x | code)

A text is a row whole, its prompt too, and every token after the code counts: so it is when the model decodes (`decode: {kind:
gedi}`), where no one says what is prompt. NLL as a mean is the paper's normalisation by length, and the classes have equal priors.

weight 0.8 is that of the authors' script (github.com/salesforce/GeDi); clean and dirty are their codes for toxicity. Theirs takes
the first token of a code, trains all weights at a rate of 2e-5, and learns `scale` where it is asked to (--logit_scale), and a
bias of each class (--outbias); here all tokens of a code are read, LoRA is the default, `scale` is a setting, and there is no
bias. Their batches are drawn from both classes together, here half of a step's samples is of each. No figure of the paper was
measured again here.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from spunge.data.samples import IGNORED, Batch
from spunge.errors import RecipeError
from spunge.recipe.training import LoRA, Trainable
from spunge.unlearning.batches import samples_of, share
from spunge.unlearning.calls import FORGET, RETAIN, Group
from spunge.unlearning.feed import forget_stream, retain_stream, total_steps
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import FIRST, retained_of
from spunge.unlearning.scored import outputs
from spunge.unlearning.trained import stored_entries, training, training_mode


class GeDiSettings(TrainingSettings):
    method: str = "gedi"
    weight: float = Field(
        0.8, ge=0, le=1, description="lambda: weight of the generative loss; the discriminative one has the rest."
    )
    desired: str = Field("clean", min_length=1, description="Control code before texts to retain.")
    undesired: str = Field("dirty", min_length=1, description="Control code before texts to forget.")
    scale: float = Field(1.0, gt=0, description="Of both classes' mean log-likelihoods before they are compared.")
    trainable: Trainable = Field(default=LoRA(), description="What is trained.")
    epochs: float | None = Field(1.0, gt=0, description="Passes over each part's samples. Give this or steps.")
    learning_rate: float = Field(1e-4, gt=0, description="Of the optimizer.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")

    @model_validator(mode="after")
    def _text_by_text(self) -> "GeDiSettings":
        if self.packing:
            raise ValueError("packing: gedi reads each text after a code; set it to false")
        return self


class Codes(NamedTuple):
    desired: list[int]
    undesired: list[int]


def codes_of(settings: GeDiSettings, tokenizer: Any) -> Codes:
    """The control codes' tokens. Raises RecipeError where the two cannot be told apart."""
    codes = Codes(
        *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (settings.desired, settings.undesired))
    )
    for name, code in codes._asdict().items():
        if not code or all(token == tokenizer.unk_token_id for token in code):
            raise RecipeError(
                f"unlearn.{name}: {vars(settings)[name]!r} has no token that the tokenizer knows; give another word"
            )
    if codes.desired == codes.undesired:
        raise RecipeError(f"unlearn.desired: {settings.desired!r} has the tokens of unlearn.undesired; give two words")
    return codes


def unlearn(task: Task, settings: GeDiSettings) -> Branch:
    """Train a class-conditional model, which tells texts to forget from texts to retain while a larger model decodes."""
    codes = codes_of(settings, task.base.tokenizer)
    longest = max(map(len, codes))
    if task.base.positions is not None:  # the code takes some
        task = replace(task, base=replace(task.base, positions=task.base.positions - longest))
    forget, retain = forget_stream(task, settings), retain_stream(task, settings, retained_of(task))
    with training(task.base, settings.trainable, task.seed, common=task.common) as trained:
        first: list[float] = []  # NLL of the first batches to retain, which stands for the base's

        def half(batch: Batch, own: int) -> tuple[Tensor, float]:
            nll = torch.stack([mean_nll(trained.model, coded(batch, code)) for code in codes], dim=-1)
            loss = 0.5 * class_losses(nll, own, settings).mean() * share(batch, samples_of)
            return loss, float(nll[:, own].detach().mean())

        def next_loss(_number: int) -> Loss:
            undesired, _ = half(next(forget), 1)
            loop.backward(undesired)  # what it holds is freed before the other half holds as much
            desired, level = half(next(retain), 0)
            if len(first) < FIRST:
                first.append(level)
            terms = {"undesired": float(undesired.detach()), "desired": float(desired.detach())}
            return Loss(float(undesired.detach()) + desired, terms, level - sum(first) / len(first))

        as_saved = partial(trained.as_saved, 1.0)
        steps = total_steps(task, settings)
        streams, memory = [forget, retain], {"first": first}
        loop = Loop(task, settings, trained.parameters, next_loss, steps, streams, memory=memory, as_saved=as_saved)
        with training_mode(trained.model):
            history = loop.run()
        return Branch(
            trained.changes(1.0), history.steps, history.losses, history.stopped, history.notes, history.watched
        )


def class_losses(nll: Tensor, own: int, settings: GeDiSettings) -> Tensor:
    """(b, 2): mean NLL of each text after the desired and the undesired code -> (b,), of texts of the class `own`, 0 or 1."""
    classes = torch.full_like(nll[:, 0], own, dtype=torch.long)
    told_apart = cross_entropy(-settings.scale * nll, classes, reduction="none")
    return settings.weight * nll[:, own] + (1 - settings.weight) * told_apart


def mean_nll(model: Any, batch: Batch) -> Tensor:
    """(b,): of each text's tokens."""
    scored = outputs(model, batch)
    return scored.sums() / scored.lengths()


def coded(batch: Batch, code: Sequence[int]) -> Batch:
    """The texts of a batch after a code, every token of theirs learned."""
    before = batch.ids.new_tensor(code).expand(len(batch.ids), -1)
    labels = batch.ids.masked_fill(batch.mask == 0, IGNORED)
    return batch._replace(
        ids=torch.cat([before, batch.ids], dim=1),
        mask=torch.cat([torch.ones_like(before), batch.mask], dim=1),
        labels=torch.cat([torch.full_like(before, IGNORED), labels], dim=1),
    )


def calls(_settings: GeDiSettings, _depth: int) -> list[Group]:
    """Each class is read after both codes."""
    return [(side._replace(everywhere=True),) * 2 for side in (FORGET, RETAIN)]


GEDI = Method(
    settings=GeDiSettings,
    source="Krause et al. 2021, arXiv 2009.06367",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    needs_retain=lambda settings: True,
)
