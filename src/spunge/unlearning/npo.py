"""NPO, negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * (NLL - NLL_base))

with the NLL summed over a sample's tokens. As beta goes to 0 its gradient becomes gradient ascent's.

Compared with the code of open-unlearning (locuslab/open-unlearning, read in November 2026).
"""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from spunge.data.samples import Batch
from spunge.unlearning.batches import samples_of
from spunge.unlearning.calls import descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.trained import stored_entries


class NPOSettings(OutputSettings):
    method: str = "npo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")


def unlearn(task: Task, settings: NPOSettings) -> Branch:
    """Push the forget samples' likelihood below the base's, ever more gently (negative preference optimisation)."""
    forget = forget_stream(task, settings)

    def loss(session: Session, batch: Batch) -> Tensor:
        base = session.base_sums(forget, batch)
        return negative_preference(session.outputs(batch).sums(), base, settings.beta)

    return descend(task, settings, loss, over=samples_of, forget=forget, sums=[forget])


def negative_preference(losses: Tensor, base: Tensor, beta: float) -> Tensor:
    """Summed NLL of each sample under the model and the base, (b,), (b,) -> scalar."""
    return -(2 / beta) * logsigmoid(beta * (losses - base)).mean()


NPO = Method(
    settings=NPOSettings,
    source="Zhang et al. 2024, arXiv 2404.05868",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings, once=1),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
    version=3,
)
