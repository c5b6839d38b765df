"""The one training loop: AdamW with accumulation, clipping, schedule, early stop, a log line per step."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from spunge.recipe import MethodSettings
from spunge.registry import RecipeError
from spunge.unlearning.method import Task


class TrainingSettings(MethodSettings):
    """What every gradient method can be told."""

    epochs: float | None = Field(None, gt=0, description="Passes over each part's samples. Give this or steps.")
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps for each part; the joint control takes their sum."
    )
    batch_size: int = Field(8, ge=1, description="Forget samples a step (retain samples: as many).")
    accumulation: int = Field(1, ge=1, description="Batches whose gradients are added up before each optimizer step.")
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Of the learning rate, down to 0."
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the steps over which the learning rate rises from 0.")
    max_grad_norm: float | None = Field(None, gt=0, description="Gradients are scaled down to this norm.")
    max_length: int = Field(256, ge=2, description="Tokens of a sample; longer ones are cut.")

    @model_validator(mode="before")
    @classmethod
    def _given_length_wins(cls, values: Any) -> Any:
        """Steps given without epochs replace a default of epochs, and the other way round."""
        if isinstance(values, dict):
            for given, other in (("steps", "epochs"), ("epochs", "steps")):
                if values.get(given) is not None and other not in values:
                    return {**values, other: None}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSettings":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both (set the other to null)")
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs or steps")
        return self

    def steps_for(self, rows: int) -> int:
        """Optimizer steps for a part of so many samples."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / self.batch_size)
        return max(1, math.ceil(batches * (self.epochs or 0) / self.accumulation))


class Loss(NamedTuple):
    total: Tensor  # scalar, to differentiate
    terms: Mapping[str, float]  # to log


class History(NamedTuple):
    steps: int
    losses: dict[str, float]  # means over the last tenth of the steps
    stopped: str | None


def train(
    task: Task,
    settings: TrainingSettings,
    parameters: list[nn.Parameter],
    next_loss: Callable[[int], Loss],
    steps: int,
    should_stop: Callable[[], str | None] = lambda: None,
) -> History:
    """Minimise `next_loss(batch number)` for `steps` optimizer steps, or until `should_stop` gives a reason.

    Raises RecipeError when a loss is not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", cpu=task.base.device.type == "cpu")
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, settings))
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    recent: deque[dict[str, float]] = deque(maxlen=max(1, steps // 10))
    stopped, step = None, 0
    log = task.log.open("w", encoding="utf-8") if task.log else None
    try:
        while step < steps and stopped is None:
            started = time.perf_counter()
            terms: dict[str, float] = {}
            for micro in range(settings.accumulation):
                with task.base.autocast():
                    loss = next_loss(step * settings.accumulation + micro)
                accelerator.backward(loss.total / settings.accumulation)
                for name, value in {"loss": float(loss.total.detach()), **loss.terms}.items():
                    terms[name] = terms.get(name, 0.0) + value / settings.accumulation
            if not math.isfinite(terms["loss"]):
                raise RecipeError(
                    f"unlearn.learning_rate: the loss became {terms['loss']} at step {step + 1} "
                    f"with {settings.learning_rate:g}; lower it"
                )
            if settings.max_grad_norm is not None:
                terms["grad_norm"] = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            recent.append(terms)
            stopped = should_stop()
            if log:
                seconds = round(time.perf_counter() - started, 4)
                log.write(json.dumps({"step": step, **terms, "learning_rate": rate, "seconds": seconds}) + "\n")
                log.flush()
            task.progress(step, steps, terms["loss"])
    finally:
        if log:
            log.close()
    means = {name: sum(terms[name] for terms in recent) / len(recent) for name in recent[-1]}
    return History(step, means, stopped)


def rate_at(step: int, steps: int, settings: TrainingSettings) -> float:
    """Factor of the learning rate at a step: a linear rise over the warm-up, then the schedule."""
    warm = int(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if settings.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0
