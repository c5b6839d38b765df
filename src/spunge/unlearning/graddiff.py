"""GradDiff, gradient difference (Yao et al. 2024, arXiv 2310.10683; Maini et al. 2024, arXiv 2401.06121, section 3).

    loss = -gamma * NLL(forget) + alpha * retain loss

with means over tokens; the retain loss is the NLL of the retain samples or, `retain_loss: kl`, KL(base || model) on them.
"""

from spunge.unlearning.calls import descending
from spunge.unlearning.ga import ascent
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.outputs import OutputSettings, descend, needs_retain
from spunge.unlearning.trained import stored_entries


class GradDiffSettings(OutputSettings):
    method: str = "graddiff"


def unlearn(task: Task, settings: GradDiffSettings) -> Branch:
    """Raise the loss on the forget samples and hold the retain samples' (gradient difference)."""
    return descend(task, settings, ascent)


GRADDIFF = Method(
    settings=GradDiffSettings,
    source="Yao et al. 2024, arXiv 2310.10683",
    unlearn=unlearn,
    calls=lambda settings, depth: descending(settings),
    stored_entries=stored_entries,
    needs_retain=needs_retain,
    shares=True,
    through=True,
    version=3,
)
