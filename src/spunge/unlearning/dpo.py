"""DPO, direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7; for unlearning Maini et al. 2024).

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * ((NLL_base - NLL)(win) - (NLL_base - NLL)(lose)))

with the NLL summed over an answer's tokens, win the refusal of a prompt and lose the answer to forget. The factor
2 / beta is NPO's, so that the two have gradients of one size; DPO's own has 1 there.

Compared with the code of open-unlearning (locuslab/open-unlearning, read in November 2026), and with trl's.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from spunge.data.samples import Batch
from spunge.unlearning.batches import Stream, samples_of
from spunge.unlearning.calls import FORGET, descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.refusals import RefusalSettings, refuse_plain_parts, refused
from spunge.unlearning.trained import stored_entries


class DPOSettings(RefusalSettings):
    method: str = "dpo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")


def unlearn(task: Task, settings: DPOSettings) -> Branch:
    """Prefer a refusal to the answer that is to be forgotten (direct preference optimisation)."""
    forget = forget_stream(task, settings)
    wanted = forget.replaced(refused(forget.samples, settings, task.base.tokenizer))
    return preferring(task, settings, settings.beta, forget, [wanted])


def preferring(task: Task, settings: OutputSettings, beta: float, forget: Stream, others: Sequence[Stream]) -> Branch:
    """Prefer other answers to those to forget. forget: of the forget samples. others: in their place those with the answers to
    prefer; where there are several, each pass over the samples takes the next."""

    def loss(session: Session, lose: Batch) -> Tensor:
        wanted = others[(forget.drawn - 1) // forget.batches % len(others)]
        win = wanted.batch(lose.rows)
        base_win, base_lose = session.base_sums(wanted, win), session.base_sums(forget, lose)
        gain, loss = base_win - session.outputs(win).sums(), base_lose - session.outputs(lose).sums()
        return preference(gain, loss, beta)

    return descend(task, settings, loss, over=samples_of, forget=forget, sums=[forget, *others])


def preference(win: Tensor, lose: Tensor, beta: float) -> Tensor:
    """NLL_base - NLL of the preferred and of the other answer, (b,), (b,) -> scalar."""
    return -(2 / beta) * logsigmoid(beta * (win - lose)).mean()


DPO = Method(
    settings=DPOSettings,
    source="Rafailov et al. 2023, arXiv 2305.18290",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings, (FORGET, FORGET), once=2),
    stored_entries=stored_entries,
    refuse=refuse_plain_parts,
    needs_retain=needs_retain,
    given=lambda samples, settings, tokenizer: {
        "to forget": samples,
        "to prefer": refused(samples, settings, tokenizer),
    },
    shares=True,
    through=True,
    version=3,
)
