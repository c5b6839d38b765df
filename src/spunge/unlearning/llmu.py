"""LLMU (Yao et al. 2024, arXiv 2310.10683): ascent on the forget answers, random answers in their place, and KL to the base.

    loss = gamma * (-ascent * NLL(answer) + random * mean over k random answers of NLL(random answer)) + alpha * KL

NLL is the mean over an answer's tokens and then over samples; the random answers are drawn anew for each batch, from those of
the retain rows; KL is KL(base || model) on the retain samples' tokens.

0.5, 1 and 1 are the weights of the authors' code. Theirs draws the k random answers once for a batch, from TruthfulQA with its
wrong answers; here each prompt has its own, from the retain rows' answers or `random_answers`. Their KL term is a cross-entropy
over padding too, which differs by a constant. Theirs stops once the loss on the answers passes 100; here there is no such stop.
No figure of the paper was measured again here.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from spunge.data.samples import Batch, Samples
from spunge.errors import RecipeError
from spunge.unlearning.batches import samples_of
from spunge.unlearning.calls import FORGET, Group, descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend
from spunge.unlearning.refusals import prompted, refuse_plain_parts, spaced
from spunge.unlearning.trained import stored_entries


class LLMUSettings(OutputSettings):
    method: str = "llmu"
    ascent: float = Field(
        0.5, ge=0, description="Weight of the ascent on the answers to forget, within the forget term."
    )
    random: float = Field(1.0, ge=0, description="Weight of the random answers, within the forget term.")
    answers: int = Field(5, ge=1, description="k: random answers to each prompt.")
    random_answers: list[str] | None = Field(
        None, min_length=1, description="Answers to draw from. Default: those of the retain rows."
    )
    retain_loss: Literal["nll", "kl"] = Field(
        "kl", description="nll: of the retain texts; kl: the divergence of the outputs from the base's on them."
    )


def unlearn(task: Task, settings: LLMUSettings) -> Branch:
    """Unlearn the answers by ascent, learn random ones in their place, and hold the outputs on the retain samples."""
    forget = forget_stream(task, settings)
    choices = random_answers(task.retain, settings)
    given = prompted(forget.samples, settings.method, task.base.tokenizer)

    def loss(session: Session, batch: Batch) -> Tensor:
        generator = np.random.default_rng([task.seed, forget.drawn])
        rows = batch.drawn or batch.rows
        drawn = generator.integers(0, len(choices), (len(rows), settings.answers))
        mine = zip(batch.rows, drawn[batch.start : batch.start + len(batch.rows)], strict=True)
        pairs = [(row, spaced(choices[place], given[row])) for row, places in mine for place in places]
        own, others = session.outputs(batch), session.outputs(forget.answered(pairs))
        return -settings.ascent * own.sample_mean(own.losses()) + settings.random * others.sample_mean(others.losses())

    return descend(task, settings, loss, over=samples_of, forget=forget)


def random_answers(retain: Samples | None, settings: LLMUSettings) -> list[str]:
    """The answers to draw from, without the space before them. Raises RecipeError where there are none."""
    if settings.random_answers is not None:
        return settings.random_answers
    if retain is None or retain.plain:
        raise RecipeError(
            "unlearn.random_answers: llmu draws them from the retain rows' answers, and there are none; give retain.prompt and "
            "retain.completion, or retain.messages, or a list of answers here"
        )
    return [_text(answer) for answer in retain.answers()]


def _text(answer: Any) -> str:
    said = answer if isinstance(answer, str) else answer.get("content")
    if not said:
        raise RecipeError(
            "unlearn.random_answers: an answer of the retain rows has no text; filter the row out, or give a list of answers"
        )
    return str(said).strip()


def refuse(parts: Mapping[str, Samples], retain: Samples | None, settings: LLMUSettings) -> None:
    """Raises RecipeError for plain texts, and where there are no random answers."""
    refuse_plain_parts(parts, retain, settings)
    random_answers(retain, settings)


def calls(settings: LLMUSettings, _depth: int) -> list[Group]:
    return descending(settings, (FORGET, FORGET._replace(samples=settings.answers)))


LLMU = Method(
    settings=LLMUSettings,
    source="Yao et al. 2024, arXiv 2310.10683",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    refuse=refuse,
    needs_retain=lambda settings: settings.alpha > 0 or settings.random_answers is None,
    shares=True,
    through=True,
)
