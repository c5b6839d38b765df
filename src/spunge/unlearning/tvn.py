"""TVN, task-vector negation (Ilharco et al. 2023, arXiv 2212.04089; Zhang et al. 2023, arXiv 2306.14870).

Fine-tune the base on the forget samples, then subtract what was learned. The change of each tensor is

    -strength * (trained - base),   with LoRA   -strength * (alpha / r) * B A

The negative sign is carried by the scale alone; negating both factors would cancel.
"""

from typing import Literal

from pydantic import Field

from spunge.recipe.training import LoRA, Trainable
from spunge.unlearning.feed import total_steps
from spunge.unlearning.finetuning import fitting
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.method import Branch, Method, Task
from spunge.unlearning.trained import stored_entries, training, training_mode


class TVNSettings(TrainingSettings):
    method: str = "tvn"
    strength: float = Field(1.0, gt=0, description="lambda: how much of what was learned is subtracted.")
    trainable: Trainable = Field(default=LoRA(), description="What is fine-tuned. Default: LoRA as in the paper.")
    epochs: float | None = Field(1.0, gt=0, description="Passes over each part's samples. Give this or steps.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Of the learning rate, down to 0.")
    learning_rate: float = Field(1e-4, gt=0, description="Of the optimizer. Not in the paper's text; our choice.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")


def unlearn(task: Task, settings: TVNSettings) -> Branch:
    """Fine-tune on the forget texts, then subtract the change (task-vector negation)."""
    with training(task.base, settings.trainable, task.seed, common=task.common) as trained:
        loop = fitting(task, settings, trained, total_steps(task, settings), -settings.strength)
        with training_mode(trained.model):
            history = loop.run()
        changes = trained.changes(-settings.strength)
    return Branch(changes, history.steps, history.losses, history.stopped, history.notes, history.watched)


TVN = Method(
    settings=TVNSettings,
    source="Ilharco et al. 2023, arXiv 2212.04089",
    unlearn=unlearn,
    stored_entries=stored_entries,
    shares=True,
    version=3,
)
