"""Several processes of this machine train one model together, each with a share of its weights; one of them makes all other stages.

execution: {kind: sharded, processes: 2}
"""

import logging
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Annotated, Literal

import torch
from pydantic import Field

from spunge.errors import LostError, RecipeError
from spunge.model.loading import pick_device
from spunge.model.ranks import Seat
from spunge.progress import Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.model import ModelSettings
from spunge.recipe.schema import Recipe
from spunge.registry import METHODS
from spunge.run.executors.channel import Begun, Failed, Message, Ready, Said, Step, Stop, Stopped, raisable
from spunge.run.executors.executor import Done, Event, Executor, Given
from spunge.run.executors.making import job_of
from spunge.run.executors.processes import LOOKED_FOR, VISIBLE, Heard, Process, ProcessesSettings, Slot, awaited, slots
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run
from spunge.temporary import TemporaryFolder

SINCE = (2, 13)  # torch, whose FSDP2 counts a parameter without a gradient as one of zeros
PATIENCE = 5.0  # seconds after the end of one process in which the others may end by themselves


class ShardedSettings(ExecutionSettings):
    kind: Literal["sharded"] = Field(
        "sharded", description="Several processes of this machine train one model together."
    )
    processes: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto",
        description="How many, each with a GPU of its own; auto: as many as there are GPUs. On a CPU give a number; they share the "
        "cores, as those of `processes` do.",
    )


def seats(settings: ShardedSettings, model: ModelSettings) -> list[Slot]:
    """Where the processes are, the main one first. Raises RecipeError for more than there are GPUs."""
    _refuse_torch()
    _refuse_packed(model)
    device = str(pick_device(model.device))
    if device not in ("cpu", "cuda"):
        raise RecipeError(
            f"model.device: {device}: several processes train together on GPUs, one on each, or on the CPU; set it to cuda or cpu"
        )
    if device == "cpu":
        if settings.processes == "auto":
            raise RecipeError(
                "execution.processes: auto: there is no GPU to count; give how many processes share the CPU"
            )
        return slots(ProcessesSettings(per_device=settings.processes), model)
    there = slots(ProcessesSettings(), model)
    count = len(there) if settings.processes == "auto" else settings.processes
    if not 2 <= count <= len(there):
        raise RecipeError(
            f"execution.processes: {settings.processes}: each needs a GPU of its own, and there are {len(there)}; give fewer, "
            "or set execution.kind to here"
        )
    first, *others = there[:count]
    if model.device_map is not None:  # it judges alone, over all of them; its own is still the first
        visible = ",".join(slot.environment[VISIBLE] for slot in there)
        first = first._replace(environment={**first.environment, VISIBLE: visible})
    return [first, *others]


def _refuse_packed(model: ModelSettings) -> None:
    if model.train_in is not None:
        raise RecipeError(
            f"model.train_in: {model.train_in}: packed weights cannot be shared out; leave it out, or set execution.kind to "
            "here or processes"
        )


def _refuse_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SINCE or find_spec("torch.distributed.fsdp") is None or not torch.distributed.is_available():
        raise RecipeError(
            f"execution.kind: sharded: needs torch {'.'.join(map(str, SINCE))} or later with torch.distributed, and this is "
            f"{torch.__version__}; install it, or set execution.kind to here"
        )


def refuse_unshared(recipe: Recipe) -> None:
    """Raises RecipeError for what several processes cannot train together."""
    if recipe.unlearn is None:
        return
    method = METHODS.get(recipe.unlearn.method)
    if method.trains and not method.shares:
        raise RecipeError(
            f"unlearn.method: {recipe.unlearn.method} does not train in several processes together; set execution.kind to here, "
            "processes or ray, or take a method that works on the model's outputs, such as npo"
        )
    if dict(recipe.unlearn).get("stop") is not None:
        raise RecipeError(
            "unlearn.stop: a model that several processes train together is not looked at on its way; leave stop out, or set "
            "execution.kind to here, processes or ray"
        )
    if "alternatives" in dict(recipe.unlearn) and (recipe.forget is None or recipe.forget.refusal is None):
        raise RecipeError(
            "forget.refusal: missing, and a model that several processes train together does not write other answers; name a "
            "column that has them, or set execution.kind to here, processes or ray"
        )
    if recipe.watch is not None and method.trains:
        raise RecipeError(
            "watch: a model that several processes train together is not measured on its way; leave watch out, or set "
            "execution.kind to here, processes or ray"
        )


class Sharded:
    """A team of processes with one model among them. What is no training the main one makes, with a model of its own."""

    def __init__(self, slots: list[Slot], begun: Run, watcher: Watcher) -> None:
        self.session = Session(begun.base, watcher)  # which loads no model
        self._slots = slots
        self._heard: Heard = queue.SimpleQueue()
        self._processes: list[Process] = []  # the main one first
        self._at: list[Process] = []  # those that are not done with the stage
        self._given: Given | None = None
        self._done: Done | None = None  # what the main one left
        self._folder = TemporaryFolder("meeting")
        self._meetings = 0

    @property
    def room(self) -> bool:
        return self._given is None

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        refuse_unshared(begun.recipe)  # of a search's trial, which may differ from the first
        if any(process.ends(0) for process in self._processes):
            self.end()
        count = len(self._slots) if stage.together else 1
        while len(self._processes) < count:
            self._processes.append(Process(self._slots[len(self._processes)], self._heard))
        self._given, self._done, self._at = Given(begun.graph.folder, stage.name), None, self._processes[:count]
        self._meetings += 1
        meeting = self._folder.path / str(self._meetings)
        job = job_of(begun, stage.name)
        for rank, process in enumerate(self._at):
            process.given, process.title = self._given, stage.title
            process.send(job._replace(seat=Seat(rank, count, meeting)) if stage.together else job)

    def told(self) -> Event:
        return awaited(self._heard, self._understood)

    def wound_down(self) -> Iterator[Event]:
        for process in self._at:
            process.send(Stop())
        ends = float("inf")  # the others wait for one that is gone, if they are in the midst of a step
        while self._at and time.monotonic() < ends:
            try:
                process, message = self._heard.get(timeout=LOOKED_FOR)
            except queue.Empty:
                continue
            if isinstance(message, Stopped | Failed) or message is None:
                ends = min(ends, time.monotonic() + PATIENCE)
                self._at = [each for each in self._at if each is not process]
            elif isinstance(message, Done) and (event := self._understood(process, message)) is not None:
                yield event
        self.end()

    def _understood(self, process: Process, message: Message | None) -> Event | None:
        """What a message says of the stage that is made; None where it says nothing of it. None as a message: the process ended."""
        main = process is self._processes[0] if self._processes else False
        if isinstance(message, Said) and main:
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, Ready | Stopped):
            process.ready, process.stopped = True, isinstance(message, Stopped)
        elif isinstance(message, Begun) and main and self._given is not None:
            return Event(self._given)
        elif isinstance(message, Step) and main and self._given is not None:
            return Event(self._given, step=(message.done, message.total, message.note))
        elif isinstance(message, Done) and process in self._at:
            self._at.remove(process)
            self._done = message if main else self._done
            return None if self._at else self._over(done=self._done)
        elif (isinstance(message, Failed) or message is None) and process in self._at:
            return self._failed(process, message)
        return None

    def _failed(self, process: Process, message: Failed | None) -> Event | None:
        """One failed, or is gone: the others wait for it, and end. Where one was killed or stopped, that is why others fail."""
        if not process.ready:
            raise LostError(f"execution: a process ended as it began ({process.slot.told}); its own lines say why")
        if isinstance(message, Failed) and isinstance(message.error, RecipeError):
            error: Exception = raisable(message)
        else:
            ends = time.monotonic() + (PATIENCE if message else 0.0)
            gone = [each for each in self._at if each.ends(max(0.0, ends - time.monotonic()))]
            self._hear_out([each for each in gone if message or each is not process])
            first = next((each for each in gone if each.killed or each.stopped), process)
            error = raisable(message) if message and first is process else first.lost()
        self.end()
        return self._over(error=error)

    def _hear_out(self, gone: list[Process]) -> None:
        """Hear to their ends processes that are gone: whether they were told to stop."""
        with suppress(queue.Empty):
            while gone:
                process, message = self._heard.get(timeout=PATIENCE)
                process.stopped = process.stopped or isinstance(message, Stopped)
                gone = [each for each in gone if message is not None or each is not process]

    def _over(self, done: Done | None = None, error: Exception | None = None) -> Event:
        given, self._given, self._at = self._given, None, []
        assert given is not None
        return Event(given, done=done, error=error)

    def end(self) -> None:
        for process in self._processes:
            process.end()
        self._processes, self._at = [], []

    def close(self) -> None:
        """End all, and leave nothing behind."""
        self.end()
        self._folder.close()


@contextmanager
def sharded(settings: ShardedSettings, begun: Run, watcher: Watcher) -> Iterator[Sharded]:
    """Several processes train one model together, each with a share of its weights (FSDP2)."""
    team = Sharded(seats(settings, begun.recipe.model), begun, watcher)
    try:
        yield team
    finally:
        team.close()


def at_once(settings: ShardedSettings, model: ModelSettings) -> int:
    seats(settings, model)
    return 1


def together(settings: ShardedSettings, model: ModelSettings) -> int:
    return len(seats(settings, model))


def elsewhere(settings: ShardedSettings, model: ModelSettings) -> tuple[int, int] | None:
    _refuse_packed(model)
    return None if settings.processes == "auto" else (1, settings.processes)


SHARDED = Executor(
    ShardedSettings, "Zhao et al. 2023, arXiv 2304.11277", at_once, sharded, together, refuse_unshared, elsewhere
)
