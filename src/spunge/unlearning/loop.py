"""The one training loop: an optimizer with accumulation, clipping, schedule, early stop, a log line per step.

It saves its state now and then, and where it is asked to stop, so that a branch that was stopped or killed goes on to the
very delta it would have had; and it ends, and goes back to the last good weights, when the loss is no number or the retain
loss explodes.

Of several processes that train together each runs it on its share of every batch, and holds its shards alone. What a decision
depends on they tell one another first, so all of them decide alike.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from spunge.errors import RecipeError
from spunge.files import append_text, write_text
from spunge.model.memory import heap_given_back, heap_kept, is_out_of_memory, release, tell
from spunge.recipe.training import SAM, DescentSettings, MethodSettings
from spunge.stopping import STOP
from spunge.unlearning.batches import Stream
from spunge.unlearning.method import Task
from spunge.unlearning.optimizers import optimizer_of
from spunge.unlearning.rectifying import blended, moved_up, rectified, taken
from spunge.unlearning.shards import drop_unreached
from spunge.unlearning.states import store_state, stored_state
from spunge.unlearning.watching import Watched, Watching

RECENT = 5  # steps over which the damage to the retain texts is averaged
LOOKED_BACK = 20  # steps that the tokens a second are told of
SNAPSHOTS = 20  # how often in a run the weights are kept as the last good ones


class TrainingSettings(DescentSettings, MethodSettings):
    """What every gradient method can be told."""

    joint_steps: int | None = Field(
        None, ge=1, description="Optimizer steps of the joint control. Default: the sum of the parts'."
    )
    retain_batch_size: int | None = Field(None, ge=1, description="Retain samples a step. Default: batch_size.")
    retain_order: Literal["shuffled", "in_order", "with_replacement"] = Field(
        "shuffled", description="How retain rows are drawn; shuffled: each once before any comes again."
    )
    max_lengths: dict[str, int] = Field(
        default_factory=dict, description="Another max_length for some parts, by value, and for `retain`."
    )
    max_damage: float | None = Field(
        5.0,
        gt=0,
        description="A branch stops, and goes back to its last good weights, once the retain loss has risen so far: nats "
        "a token over the base's (RMU: squared error of the hidden states, as a share of their square).",
    )

    def steps_of(self, rows: Mapping[str, int]) -> dict[str, int]:
        """Optimizer steps spent on each of a job's parts, of so many samples each."""
        own = {value: self.steps_for(count) for value, count in rows.items()}
        if self.joint_steps is None or len(rows) == 1:
            return own
        ends = [round(self.joint_steps * place / len(own)) for place in range(len(own) + 1)]
        return {value: ends[place + 1] - ends[place] for place, value in enumerate(own)}

    def length_of(self, part: str) -> int:
        """Most tokens of a sample of a part, or of `retain`."""
        return self.max_lengths.get(part, self.max_length)


class Loss(NamedTuple):
    """Numbers to log may stay where they are computed until the step's gradients are asked for: to read one is to wait for it."""

    total: Tensor  # scalar, to differentiate
    terms: Mapping[str, float | Tensor]  # to log
    damage: float | Tensor | None = None  # how far the retain loss has risen; see max_damage


class History(NamedTuple):
    steps: int
    losses: dict[str, float]  # means over the last tenth of the steps
    stopped: str | None
    notes: dict[str, Any]
    watched: Watched | None = None


@dataclass
class Loop:
    """A training run. `memory`: lists of the method's own that go into the saved state. `as_saved`: inside it, the model in memory
    is the branch as it would be saved; without it nothing is watched."""

    task: Task
    settings: TrainingSettings
    parameters: list[nn.Parameter]
    next_loss: Callable[[int], Loss]  # of the batch number
    steps: int
    streams: Sequence[Stream]  # that next_loss draws from
    should_stop: Callable[[], str | None] = lambda: None
    memory: dict[str, list[float]] = field(default_factory=dict)
    pieces: int = field(default=1, init=False)  # of a batch, where the memory does not hold it whole
    as_saved: Callable[[], AbstractContextManager[Any]] | None = None
    # next_loss's forget term and its retain term, each for itself. Without them SAM moves along all of the loss.
    apart: tuple[Callable[[int], Loss], Callable[[int], Loss]] | None = None
    gru: float | None = None  # see rectifying.py; with `apart`
    rate_setting: str | None = None  # where the learning rate stands, for errors; None: in the task's block
    # What to do where the loss is flat at every step, for the error.
    if_flat: str = "give a term of it a weight above 0, or other rows"
    sloped: bool = field(default=False, init=False)  # whether any step had a gradient
    retained: list[Tensor] = field(default_factory=list, init=False)  # GRU's running mean of retain gradients

    def run(self) -> History:
        """Minimise until the last step, or until there is a reason to stop.

        Raises RecipeError when it goes wrong before there are good weights to go back to.
        """
        settings = self.settings
        self.ranks = self.task.base.ranks
        self.optimizer = optimizer_of(self.parameters, settings, self.task.setting)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_at(step, self.steps, settings)
        )
        self.recent: deque[dict[str, float]] = deque(maxlen=max(1, self.steps // 10))
        self.damages: deque[float] = deque(maxlen=RECENT)
        self.good: tuple[int, list[Tensor]] = 0, []  # a run that goes wrong before the first snapshot is an error
        self.watching = self._watching()
        self.step, stopped = self._resumed()
        saved = time.monotonic()
        self.read = deque([(time.perf_counter(), sum(stream.tokens for stream in self.streams))], maxlen=LOOKED_BACK)
        _begin_log(self.task.log, self.step)
        with STOP.looked_for(), heap_given_back() if self.ranks.shared else heap_kept():
            self._look(stopped)
            while self.step < self.steps and stopped is None:
                stopped = self._next_step()
                self._look(stopped)
                due = stopped is None and time.monotonic() - saved >= self.task.save_seconds
                asked = self.ranks.any(STOP.asked)
                if self.task.state and (self.ranks.any(due) or asked):
                    self._save(self.task.state, stopped)
                    saved = time.monotonic()
                if asked:
                    raise KeyboardInterrupt
        if self.step and not self.sloped:
            raise RecipeError(
                f"{self.task.setting}: the loss had no slope at any step, so that nothing was learned; {self.if_flat}"
            )
        means, watched = self._means(), None
        if self.watching is not None:
            watched, means = self.watching.ended(self.step, means)
        notes = {} if self.pieces == 1 else {"out of memory": f"each batch in {self.pieces} pieces"}
        return History(watched.kept if watched else self.step, means, stopped, notes, watched)

    def _means(self) -> dict[str, float]:
        """Of the logged terms over the last steps; none before the first."""
        last = self.recent[-1] if self.recent else {}
        return {name: sum(terms[name] for terms in self.recent) / len(self.recent) for name in last}

    def _watching(self) -> Watching | None:
        task = self.task
        if task.watch is None:
            return None
        if self.as_saved is None:
            raise RecipeError(
                f"watch: the method of {task.setting} does not show on its way what it would save; leave watch out"
            )
        return Watching(task.watch, task.base, self.parameters, self.as_saved)

    def _look(self, stopped: str | None) -> None:
        """Measure the model as it is now, where it is due."""
        last = self.step >= self.steps or stopped is not None
        if self.watching is not None and self.watching.is_due(self.step, last):
            self.task.progress(self.step, self.steps, self.watching.look(self.step, self._means(), self.good[0]))

    def _next_step(self) -> str | None:
        """One optimizer step, logged and told, or back to the last good weights; why the branch must stop, if so."""
        started = time.perf_counter()
        terms = self._gradients()
        if (wrong := self._gone_wrong(terms)) is not None:
            return wrong
        rate = self._update(terms)
        stopped = self.should_stop()
        if self.task.log:
            seconds = round(time.perf_counter() - started, 4)
            line = {"step": self.step, **terms, "learning_rate": rate, "seconds": seconds}
            append_text(self.task.log, json.dumps(line) + "\n")
        speed = self._speed()
        told = f", {speed:,.0f} tokens/s" if speed else ""
        self.task.progress(self.step, self.steps, f"loss {terms['loss']:.4g}{told}")
        return stopped

    def _speed(self) -> float:
        """Tokens a second over the last steps, of what the method draws; 0 where it draws none."""
        self.read.append((time.perf_counter(), sum(stream.tokens for stream in self.streams)))
        (since, before), (now, tokens) = self.read[0], self.read[-1]
        return (tokens - before) / max(now - since, 1e-9)

    def backward(self, term: Tensor) -> None:
        """Add the gradient of one term of the loss at once, which frees what it holds; next_loss gives the other terms."""
        if not term.requires_grad:
            return
        with torch.autocast(self.task.base.device.type, enabled=False):
            torch.autograd.backward(term / (self.settings.accumulation * self.pieces))

    def _gradients(self) -> dict[str, float]:
        """Of one optimizer step's batches; returns the logged terms. What does not fit into the memory is done again in pieces."""
        drawn = [stream.drawn for stream in self.streams]
        kept = {name: len(values) for name, values in self.memory.items()}
        while (terms := self._attempted()) is None:
            self._halve()
            for stream, count in zip(self.streams, drawn, strict=True):
                stream.give_again(count, self.pieces)
            for name, length in kept.items():
                del self.memory[name][length:]
        return terms

    def _attempted(self) -> dict[str, float] | None:
        """The terms; None where the memory does not suffice. Its own function, so that no traceback holds what did not fit."""
        try:
            return self._summed()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.ranks.shared:  # the others wait for this one in the midst of a step
                raise RecipeError(
                    f"{self.task.setting}.batch_size: {self.settings.batch_size}: the memory of process "
                    f"{self.ranks.rank + 1} of {self.ranks.count} does not hold its share of a batch; lower it and raise "
                    "accumulation, or give more processes"
                ) from error
            return None

    def _halve(self) -> None:
        self.optimizer.zero_grad()
        release()
        size, setting = max(stream.size for stream in self.streams), self.task.setting
        if self.pieces >= size:
            raise RecipeError(
                f"{setting}.max_length: {self.settings.max_length}: the memory does not hold a training step on one sample; "
                f"lower it, train less ({setting}.trainable), or give a smaller model or another device"
            )
        self.pieces *= 2
        tell(
            f"out of memory at step {self.step + 1}: each batch of {size} is taken in {self.pieces} pieces from here on; "
            "the gradient is the whole batch's"
        )

    def _summed(self) -> dict[str, float]:
        """The gradient of the step's batches, and the logged terms."""
        optimizer = self.settings.optimizer
        rho = optimizer.sam if isinstance(optimizer, SAM) else None
        changed = rho is not None or self.gru is not None
        forget, retain = self.apart if self.apart and changed else (self.next_loss, None)
        drawn = [stream.drawn for stream in self.streams]
        terms = self._over_batches(forget)
        if rho is not None:
            self._taken_where_it_is_steepest(rho, forget, drawn)
        if retain is not None and self.gru is None:
            kept = self._over_batches(retain)
            terms |= kept | {"loss": terms["loss"] + kept["loss"]}
        elif retain is not None and self.gru is not None:
            gradients = taken(self.parameters)
            terms |= {name: value for name, value in self._over_batches(retain).items() if name != "loss"}
            mean = blended(self.retained, taken(self.parameters), self.parameters, self.gru)
            for parameter, gradient in zip(self.parameters, rectified(gradients, mean, self.ranks), strict=True):
                parameter.grad = gradient
            self.retained = mean  # last, as a step that the memory does not hold is done again
        return dict(zip(terms, self.ranks.means([*terms.values()]), strict=True))

    def _taken_where_it_is_steepest(self, rho: float, forget: Callable[[int], Loss], drawn: Sequence[int]) -> None:
        """The gradient of the same batches once more, at weights that are moved along it."""
        kept = {name: len(values) for name, values in self.memory.items()}
        damages = list(self.damages)
        with moved_up(self.parameters, rho, self.ranks):
            for stream, count in zip(self.streams, drawn, strict=True):
                if stream.drawn != count:
                    stream.give_again(count, self.pieces)
            self._over_batches(forget)
        for name, length in kept.items():
            del self.memory[name][length:]
        self.damages.clear()
        self.damages.extend(damages)

    def _over_batches(self, next_loss: Callable[[int], Loss]) -> dict[str, float]:
        """Add up the gradients of the step's batches; their terms' means."""
        settings, batches = self.settings, self.settings.accumulation * self.pieces
        losses: list[Loss] = []
        for micro in range(batches):
            try:
                with self.task.base.autocast():
                    loss = next_loss(self.step * settings.accumulation + micro // self.pieces)
            except RecipeError:
                raise
            except ValueError as error:  # of the architecture's own code, such as a length that it cannot train on
                kind, reason = type(self.task.base.model).__name__, " ".join(str(error).split())
                raise RecipeError(f"model.path: {kind} does not take such a batch: {reason}") from error
            if not loss.total.requires_grad:
                raise RecipeError(
                    f"{self.task.setting}.trainable: no gradient of the loss reaches what is trained in "
                    f"{type(self.task.base.model).__name__}; train other tensors"
                )
            torch.autograd.backward(loss.total / batches)
            losses.append(loss._replace(total=loss.total.detach()))
        if self.ranks.shared:
            drop_unreached(self.parameters, self.ranks)
        told = [(name, value) for loss in losses for name, value in {"loss": loss.total, **loss.terms}.items()]
        damages = [loss.damage for loss in losses if loss.damage is not None]
        numbers = read_at_once([*(value for _, value in told), *damages])
        terms: dict[str, float] = {}
        for (name, _), number in zip(told, numbers, strict=False):
            terms[name] = terms.get(name, 0.0) + number / batches
        if damages:
            self.damages += self.ranks.means([sum(numbers[len(told) :]) / len(damages)])
        return terms

    def _gone_wrong(self, terms: Mapping[str, float]) -> str | None:
        """Why the branch must stop, with the last good weights put back; keeps these weights now and then otherwise."""
        settings, setting, reason = self.settings, self.task.setting, None
        rate = self.rate_setting or f"{setting}.learning_rate"
        damage = sum(self.damages) / len(self.damages) if self.damages else 0.0
        if not math.isfinite(terms["loss"]):
            reason = f"the loss became {terms['loss']}"
        elif settings.max_damage is not None and not damage <= settings.max_damage:
            reason = f"the retain loss rose by {damage:.3g}, more than {setting}.max_damage ({settings.max_damage:g}),"
        if reason is None:
            # The mean lags behind; the last damage is that of the very weights that would be kept.
            latest = self.damages[-1] if self.damages else 0.0
            calm = settings.max_damage is None or max(damage, latest) <= settings.max_damage / 2
            if calm and self.step - self.good[0] >= max(1, self.steps // SNAPSHOTS):
                kept = self.good[1] or [torch.empty_like(parameter) for parameter in self.parameters]
                for value, parameter in zip(kept, self.parameters, strict=True):
                    value.copy_(parameter.detach())
                self.good = self.step, kept
            return None
        reason += f" at step {self.step + 1} with {rate} {settings.learning_rate:g}"
        step, kept = self.good
        if step == 0:
            raise RecipeError(f"{rate}: {settings.learning_rate:g}: {reason}; lower it")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
        self.step = step
        if self.watching is not None:
            self.watching.go_back(step)
            self._look(reason)
            step = self.watching.best.step if self.watching.best else step
        return f"{reason}; the weights after step {step} are kept"

    def _update(self, terms: dict[str, float]) -> float:
        """One optimizer step; returns its learning rate."""
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        norm = None
        if self.settings.max_grad_norm is not None:
            norm = nn.utils.get_total_norm(gradients)
            if self.ranks.shared:  # each has its shards' gradients
                norm = norm.new_tensor(math.sqrt(self.ranks.sum(float(norm) ** 2)))
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        elif not self.sloped:
            self.sloped = self.ranks.any(any(bool(each.any()) for each in gradients))
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if norm is not None:
            terms["grad_norm"] = float(norm)
            self.sloped = self.sloped or terms["grad_norm"] != 0
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.recent.append(terms)
        return rate

    def _save(self, file: Path, stopped: str | None) -> None:
        """Everything that the rest of the run depends on: whole, or not there."""
        content = {
            "step": self.step,
            "stopped": stopped,
            "pieces": self.pieces,
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "good": (self.good[0], [value.cpu() for value in self.good[1]]),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "drawn": [stream.drawn for stream in self.streams],
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "recent": list(self.recent),
            "damages": list(self.damages),
            "sloped": self.sloped,
            "memory": self.memory,
            "retained": [value.cpu() for value in self.retained],
            "watched": self.watching and self.watching.state(),
        }
        store_state(file, content, self.step, self.ranks)

    def _resumed(self) -> tuple[int, str | None]:
        """Take up a saved state; returns how many steps are done, and why there are no more, if so."""
        content = stored_state(self.task.state, self.ranks) if self.task.state else None
        if content is None:
            return 0, None
        with torch.no_grad():
            for parameter, value in zip(self.parameters, content["parameters"], strict=True):
                parameter.copy_(value)
        self.good = content["good"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.pieces = content["pieces"]
        for stream, drawn in zip(self.streams, content["drawn"], strict=True):
            stream.skip(drawn)
            stream.pieces = self.pieces
        torch.set_rng_state(content["random"])
        if content["cuda"]:
            torch.cuda.set_rng_state_all(content["cuda"])
        devices = [parameter.device for parameter in self.parameters]
        self.retained = [value.to(device) for value, device in zip(content.get("retained", []), devices, strict=False)]
        self.recent.extend(content["recent"])
        self.damages.extend(content["damages"])
        self.sloped = content.get("sloped", True)
        for name, values in content["memory"].items():
            self.memory[name][:] = values
        if self.watching is not None:
            self.watching.resume(content.get("watched"))
        return int(content["step"]), content["stopped"]


def read_at_once(values: Sequence[float | Tensor]) -> list[float]:
    """Scalars, some of them still being computed, as numbers; those of one device and dtype come in one piece."""
    found: dict[int, float] = {}
    alike: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for at, value in enumerate(values):
        if isinstance(value, Tensor):
            alike.setdefault((value.device, value.dtype), {})[at] = value.reshape(())
        else:
            found[at] = value
    for tensors in alike.values():
        found |= zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)
    return [found[at] for at in range(len(values))]


def _begin_log(file: Path | None, steps: int) -> None:
    """Leave in the log the lines of the steps that are done, and no others."""
    if file is not None:
        earlier = file.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if steps and file.exists() else []
        write_text(file, "".join(earlier))


def rate_at(step: int, steps: int, settings: TrainingSettings) -> float:
    """Factor of the learning rate at a step: a linear rise over the warm-up, then the schedule."""
    warm = int(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if settings.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0
