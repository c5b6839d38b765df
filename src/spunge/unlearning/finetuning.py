"""Fine-tuning that leaves no trace, for audits: LoRA factors on some samples, measured on the way, then taken off again."""

from collections.abc import Callable, Sequence

from spunge.data.samples import Samples
from spunge.model.loading import Base
from spunge.unlearning.batches import learned_tokens, share
from spunge.unlearning.feed import forget_stream
from spunge.unlearning.loop import Loop, Loss, TrainingSettings
from spunge.unlearning.method import Task
from spunge.unlearning.scored import outputs
from spunge.unlearning.trained import LoRA, training, training_mode


class FinetuningSettings(TrainingSettings):
    method: str = "finetuning"


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
) -> None:
    """Minimise the NLL of `samples` with LoRA on every linear layer; `pause(step)` is called at each of the steps `pauses`.

    While it is called, `base.model` is the model as it is then; step 0 is before the first.
    """
    settings = FinetuningSettings(
        steps=max(1, *pauses), batch_size=batch_size, learning_rate=learning_rate, max_length=max_length
    )
    task = Task(base, {"": samples}, None, {"": seed})
    stream = forget_stream(task, settings)
    with training(base, LoRA(dropout=0.0, targets="all-linear"), seed) as trained:

        def pause_here(step: int) -> None:
            if step in pauses:
                trained.model.eval()
                pause(step)
                trained.model.train()

        def between() -> None:
            pause_here(loop.step)

        def next_loss(_number: int) -> Loss:
            batch = next(stream)
            return Loss(outputs(trained.model, batch).mean() * share(batch, learned_tokens), {})

        steps = max(pauses)
        loop = Loop(task, settings, trained.parameters, next_loss, steps, [stream], should_stop=between)
        with training_mode(trained.model):
            pause_here(0)
            if steps:
                loop.run()
