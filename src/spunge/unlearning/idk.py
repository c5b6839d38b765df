"""IDK (Maini et al. 2024, arXiv 2401.06121, section 3): learn to answer the forget prompts with a refusal.

forget loss = NLL of the refusals, mean over their tokens
"""

from typing import ClassVar, Literal

from torch import Tensor

from spunge.data.samples import Batch
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.outputs import OutputSettings, Session, descend, needs_retain, passes_of
from spunge.unlearning.refusals import RefusalSettings, refused


class IDKSettings(RefusalSettings):
    method: Literal["idk"] = "idk"


class IDK:
    """Learn to answer the forget prompts with a refusal."""

    Settings: ClassVar[type[OutputSettings]] = IDKSettings
    source: ClassVar[str] = "Maini et al. 2024, arXiv 2401.06121"
    needs_retain = staticmethod(needs_retain)
    version: ClassVar[int] = 1

    @staticmethod
    def passes(settings: IDKSettings, depth: int) -> float:
        return passes_of(settings, 1.0)

    @staticmethod
    def unlearn(task: Task, settings: IDKSettings) -> Branch:
        forget = forget_stream(task, settings)
        wanted = forget.replaced(refused(forget.samples, settings, task.base.tokenizer))

        def loss(session: Session, batch: Batch) -> Tensor:
            return session.outputs(wanted.batch(batch.rows)).mean()

        return descend(task, settings, loss, forget=forget)
