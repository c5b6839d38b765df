"""RMU, representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218, section 4).

With M_u and M_0 the hidden states after block l of the trained model and of the base, u a fixed random unit vector:

    loss = mean over forget tokens |M_u - c u|^2 / d  +  alpha * mean over retain tokens |M_u - M_0|^2 / d

Only the MLP output projections of blocks l-2, l-1 and l are trained (of all experts, in a mixture of them). Both terms are
divided by the hidden size d (as the reference code does; the paper divides by neither), so alpha means the same in both.
Padding enters neither term; the reference code averages over it.

    spunge run demo --set unlearn.method=rmu
    spunge run demo --set unlearn.layer=auto --set unlearn.coefficient=auto
"""

from collections.abc import Mapping
from typing import ClassVar

from spunge.data.samples import Samples
from spunge.model.loading import Base
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.method import Branch, Settled, Task
from spunge.unlearning.rmu.settings import TRAINED_BLOCKS, TYPICAL_LAYER, RMUSettings, block_index
from spunge.unlearning.rmu.steering import steer
from spunge.unlearning.rmu.tuning import tune


class RMU:
    """Steer the forget texts' hidden states to a fixed random direction; hold the retain texts' where they are."""

    Settings: ClassVar[type[TrainingSettings]] = RMUSettings
    source: ClassVar[str] = "Li et al. 2024, arXiv 2403.03218"
    needs_retain: ClassVar[bool] = True
    version: ClassVar[int] = 2

    @staticmethod
    def passes(settings: RMUSettings, depth: int) -> float:
        layer = block_index(TYPICAL_LAYER if settings.layer == "auto" else settings.layer, depth)
        # Forget and retain: the frozen prefix once, the trained blocks four times (base, forward, backward twice).
        return 2 * (max(0, layer - TRAINED_BLOCKS + 1) + 4 * min(TRAINED_BLOCKS, layer + 1)) / depth

    @staticmethod
    def last_block(settings: RMUSettings, depth: int) -> int | None:
        # What is trained by the recipe's own choice may lie anywhere.
        return block_index(settings.layer, depth) if settings.trainable is None else None

    @staticmethod
    def settle(base: Base, parts: Mapping[str, Samples], retain: Samples, settings: RMUSettings, seed: int) -> Settled:
        return tune(base, parts, retain, settings, seed)

    @staticmethod
    def unlearn(task: Task, settings: RMUSettings) -> Branch:
        return steer(task, settings)
