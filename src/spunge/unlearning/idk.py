"""IDK (Maini et al. 2024, arXiv 2401.06121, section 3): learn to answer the forget prompts with a refusal.

    forget loss = NLL of the refusals, mean over their tokens

The loss is gamma times this mean plus alpha times the mean over the retain answers' tokens. TOFU's code concatenates both and takes
one mean over all tokens, which weighs the longer retain answers more.
"""

from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.calls import descending
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import Session, descend, needs_retain
from spunge.unlearning.refusals import RefusalSettings, refuse_plain_parts, refused
from spunge.unlearning.trained import stored_entries


class IDKSettings(RefusalSettings):
    method: str = "idk"


def unlearn(task: Task, settings: IDKSettings) -> Branch:
    """Learn to answer the forget prompts with a refusal."""
    forget = forget_stream(task, settings)
    wanted = forget.replaced(refused(forget.samples, settings, task.base.tokenizer))

    def loss(session: Session, batch: Batch) -> Tensor:
        return session.outputs(batch).mean()

    return descend(task, settings, loss, forget=wanted)


IDK = Method(
    settings=IDKSettings,
    source="Maini et al. 2024, arXiv 2401.06121",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    refuse=refuse_plain_parts,
    needs_retain=needs_retain,
    given=lambda samples, settings, tokenizer: {"refusal": refused(samples, settings, tokenizer)},
    shares=True,
    through=True,
    version=3,
)
