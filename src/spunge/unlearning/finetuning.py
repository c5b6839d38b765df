"""Plain fine-tuning, the NLL of samples as their tokens' mean: to teach a model, and for audits without a trace."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.model.loading import Base
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import DescentSettings, Everything, LoRA, Optimizer
from spunge.unlearning.batches import learned_tokens, share
from spunge.unlearning.feed import forget_stream, total_steps
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Branch, Task
from spunge.unlearning.scored import outputs
from spunge.unlearning.trained import Trained, training, training_mode


class FinetuningSettings(TrainingSettings):
    method: str = "finetuning"


def fitting(task: Task, settings: TrainingSettings, trained: Trained, steps: int, factor: float = 1.0) -> Loop:
    """The loop that minimises the NLL of a task's samples. factor: how much of what is learned will be saved."""
    stream = forget_stream(task, settings)

    def next_loss(_number: int) -> Loss:
        batch = next(stream)
        return Loss(outputs(trained.model, batch).mean() * share(batch, learned_tokens), {})

    as_saved = partial(trained.as_saved, factor)
    return Loop(task, settings, trained.parameters, next_loss, steps, [stream], as_saved=as_saved)


def teach(task: Task, settings: TeachSettings) -> Branch:
    """Learn the task's samples. Raises RecipeError where the training goes wrong: a model that is taught in part is no base."""
    told = FinetuningSettings(**{name: vars(settings)[name] for name in DescentSettings.model_fields})
    with training(task.base, settings.trainable, task.seed, task.setting) as trained:
        loop = fitting(task, told, trained, total_steps(task, told))
        with training_mode(trained.model):
            history = loop.run()
        if history.stopped is not None:
            raise RecipeError(
                f"{task.setting}.learning_rate: {settings.learning_rate:g}: {history.stopped.partition(';')[0]}; lower it"
            )
        return Branch(trained.changes(1.0), history.steps, history.losses, notes=history.notes, watched=history.watched)


def finetune(
    base: Base,
    samples: Samples,
    *,
    pauses: Sequence[int],
    pause: Callable[[int], None],
    batch_size: int,
    learning_rate: float,
    max_length: int,
    seed: int,
    trainable: Literal["lora", "all"] = "lora",
    optimizer: Optimizer = "adamw",
) -> None:
    """Minimise the NLL of `samples`; `pause(step)` is called at each of the steps `pauses`.

    trainable: LoRA factors on every linear layer, or all weights. While `pause` is called, `base.model` is the model as it is then;
    step 0 is before the first. It leaves no trace. Raises RecipeError where the training goes wrong.
    """
    steps = max(pauses)
    settings = FinetuningSettings(
        steps=max(1, steps),
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        max_length=max_length,
    )
    task = Task(base, {"": samples}, None, {"": seed}, setting="evaluate.attack")
    what = Everything() if trainable == "all" else LoRA(dropout=0.0, targets="all-linear")
    with training(base, what, seed, task.setting) as trained:
        loop = fitting(task, settings, trained, steps)

        def pause_at(step: int) -> None:
            if step in pauses:
                trained.model.eval()
                pause(step)
                trained.model.train()

        def between() -> None:
            pause_at(loop.step)

        loop.should_stop = between
        with training_mode(trained.model):
            pause_at(0)
            history = loop.run() if steps else None
        if history is not None and history.stopped is not None:
            raise RecipeError(
                f"evaluate.attack.learning_rate: {learning_rate:g}: {history.stopped.partition(';')[0]}; lower it"
            )
