"""SimNPO (Fan et al. 2024, arXiv 2410.07163, equation 4): NPO without a reference, its NLL divided by the length.

    forget loss = -(2 / beta) * mean over samples of log sigmoid(beta * (NLL / length - delta))

beta 4.5, delta 0 and gamma 0.125 are those of open-unlearning (locuslab/open-unlearning, read in November 2026), and of the
authors' run on TOFU's forget10 (on forget05 beta 2.5 and gamma 0.1375). open-unlearning divides the sum by all n labels of a
row; of a text without a prompt the first token is no prediction, so that the sum has n - 1 terms there. Here it is divided by
the predictions that it has.
"""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from spunge.data.samples import Batch
from spunge.unlearning.batches import samples_of
from spunge.unlearning.calls import descending
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain
from spunge.unlearning.trained import stored_entries


class SimNPOSettings(OutputSettings):
    method: str = "simnpo"
    beta: float = Field(4.5, gt=0, description="Inverse temperature.")
    delta: float = Field(0.0, ge=0, description="Margin, in nats a token.")
    gamma: float = Field(0.125, ge=0, description="Weight of the forget term.")


def unlearn(task: Task, settings: SimNPOSettings) -> Branch:
    """Push the forget samples' likelihood down by length-normalised preference, without a reference."""

    def loss(session: Session, batch: Batch) -> Tensor:
        scored = session.outputs(batch)
        return simple_preference(scored.sums() / scored.lengths(), settings.beta, settings.delta)

    return descend(task, settings, loss, over=samples_of)


def simple_preference(means: Tensor, beta: float, delta: float) -> Tensor:
    """Mean NLL of each sample's tokens, (b,) -> scalar."""
    return -(2 / beta) * logsigmoid(beta * (means - delta)).mean()


SIMNPO = Method(
    settings=SimNPOSettings,
    source="Fan et al. 2024, arXiv 2410.07163",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
    version=3,
)
