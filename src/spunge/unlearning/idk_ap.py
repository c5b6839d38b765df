"""IDK+AP, answer preservation (Yuan et al. 2025, arXiv 2410.08109): refuse the forget prompts, and prefer to answer the others.

    forget loss = NLL of the refusals, mean over their tokens
    retain loss = -(1 / beta) * mean over samples of log sigmoid(beta * (NLL(refusal) - NLL(answer)))

with the retain loss's NLL summed over an answer's tokens. Once a retain prompt's answer is far likelier than the refusal, its
term rests, so that nothing else is learned of it; no base is asked.

Refusals for retain prompts come from the same list; NLL is summed over an answer, as in the authors' code. No figure of the
paper was measured again here.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from spunge.data.samples import Batch, Samples
from spunge.unlearning.batches import samples_of, share
from spunge.unlearning.calls import FORGET, RETAIN, Group
from spunge.unlearning.feed import forget_stream, retain_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import Session, Term, descend, needs_retain, retained_of
from spunge.unlearning.refusals import RefusalSettings, refuse_plain, refuse_plain_parts, refused
from spunge.unlearning.trained import stored_entries


class IDKAPSettings(RefusalSettings):
    method: str = "idk_ap"
    beta: float = Field(0.1, gt=0, description="Inverse temperature of answer preservation.")
    retain_loss: Literal["preservation"] = Field(  # type: ignore[assignment]
        "preservation", description="The retain term is the method's own: prefer the answer to a refusal."
    )


def unlearn(task: Task, settings: IDKAPSettings) -> Branch:
    """Learn to refuse the forget prompts, and to answer the retain prompts rather than to refuse."""
    forget = forget_stream(task, settings)
    wanted = forget.replaced(refused(forget.samples, settings, task.base.tokenizer))

    def loss(session: Session, batch: Batch) -> Tensor:
        return session.outputs(batch).mean()

    if not settings.alpha:
        return descend(task, settings, loss, forget=wanted)
    retain = retain_stream(task, settings, retained_of(task))
    refusals = retain.replaced(refused(retain.samples, settings, task.base.tokenizer, "retain"))

    def preserve(session: Session, held: Batch) -> Term:
        answer = session.outputs(held)
        losses = answer.losses()
        refusal = session.outputs(refusals.batch(held.rows)).sums()
        kept = preservation(answer.per_sample(losses), refusal, settings.beta)
        return Term(kept * share(held, samples_of), answer.mean_of(losses.detach()), settings.alpha)

    return descend(task, settings, loss, forget=wanted, retain=retain, retain_term=preserve)


def preservation(answers: Tensor, refusals: Tensor, beta: float) -> Tensor:
    """Summed NLL of each retain prompt's answer and of its refusal, (b,), (b,) -> scalar."""
    return -(1 / beta) * logsigmoid(beta * (refusals - answers)).mean()


def refuse(parts: Mapping[str, Samples], retain: Samples | None, settings: IDKAPSettings) -> None:
    """Raises RecipeError for plain texts."""
    refuse_plain_parts(parts, retain, settings)
    if retain is not None and settings.alpha:
        refuse_plain(retain, settings.method, "retain")


def calls(settings: IDKAPSettings, _depth: int) -> list[Group]:
    return [(FORGET,), (RETAIN, RETAIN)] if settings.alpha else [(FORGET,)]


IDK_AP = Method(
    settings=IDKAPSettings,
    source="Yuan et al. 2025, arXiv 2410.08109",
    unlearn=unlearn,
    calls=calls,
    stored_entries=stored_entries,
    refuse=refuse,
    needs_retain=needs_retain,
    given=lambda samples, settings, tokenizer: {"refusal": refused(samples, settings, tokenizer)},
    shares=True,
    through=True,
)
