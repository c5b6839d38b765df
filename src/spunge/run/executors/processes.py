"""Several processes of this machine make the stages, each with a device of its own.

execution: {kind: processes, devices: auto, per_device: 1}
"""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from spunge.errors import LostError, RecipeError
from spunge.merging.work import processors
from spunge.model.loading import pick_device
from spunge.progress import Watcher
from spunge.recipe.execution import ExecutionSettings
from spunge.recipe.model import ModelSettings
from spunge.run.executors.channel import (
    Begun,
    Failed,
    GaveUp,
    Left,
    Message,
    Ready,
    Said,
    Step,
    Stop,
    Stopped,
    raisable,
)
from spunge.run.executors.executor import Done, Event, Executor, Given
from spunge.run.executors.lending import Lending
from spunge.run.executors.making import Job, job_of
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run
from spunge.stopping import STOP

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
LOOKED_FOR = 0.2  # seconds after which a stop is looked for
PATIENCE = 2.0  # seconds that what a process said may still be on its way when it has ended
STDERR = 2
# No file of the folder that a command is given in stands for a module; Ctrl-C is heard by the process that gives the stages out.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from spunge.run.executors.worker import main; main({parent}, {handle})"
)
GO_ON = "the same command goes on from what is finished"


class ProcessesSettings(ExecutionSettings):
    kind: Literal["processes"] = Field("processes", description="Several processes of this machine.")
    devices: Literal["auto"] | list[Annotated[int, Field(ge=0)]] = Field(
        "auto", description="Numbers of GPUs, such as [0, 1]. auto: all that there are, or the CPU."
    )
    per_device: int = Field(
        1,
        ge=1,
        description="Processes on each device; each holds a model of its own. On a CPU they share the cores: each has as many "
        "threads as cores / processes, unless OMP_NUM_THREADS says how many.",
    )


class Slot(NamedTuple):
    """A place for a process: its device, as people read it, and what its environment says of it."""

    told: str
    environment: dict[str, str]


def slots(settings: ProcessesSettings, model: ModelSettings) -> list[Slot]:
    """Where processes can be: one on each device first. Raises RecipeError for devices that are not there."""
    devices = _devices(settings, model)
    count = len(devices) * settings.per_device
    threads = {} if os.environ.get(THREADS) else {THREADS: str(max(1, processors() // count))}
    return [Slot(told, {**visible, **threads}) for _ in range(settings.per_device) for told, visible in devices.items()]


def _devices(settings: ProcessesSettings, model: ModelSettings) -> dict[str, dict[str, str]]:
    """Device -> what the environment of a process says of it."""
    device = pick_device(model.device)
    asked = settings.devices if isinstance(settings.devices, list) else None
    if str(device) != "cuda":
        if asked is not None:
            raise RecipeError(
                f"execution.devices: {asked}: numbers of GPUs, and model.device is {str(device)!r}; leave devices out and set "
                "per_device, or set model.device to cuda"
            )
        return {str(device): {}}
    given = os.environ.get(VISIBLE)
    names = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if asked is not None and (not _named_once(asked) or max(asked) >= len(names)):
        raise RecipeError(
            f"execution.devices: {asked}: there are {len(names)} GPUs, counted from 0; name each that is to be used once, or "
            "give auto"
        )
    return {f"cuda:{number}": {VISIBLE: names[number].strip()} for number in (asked or range(len(names)))}


def _named_once(devices: list[int]) -> bool:
    """Whether there are some, each once."""
    return 0 < len(devices) == len(set(devices))


class Process:
    """A process, and the stage that it makes. needs: of the stage that it made last, whose model it may still hold."""

    def __init__(self, slot: Slot, heard: "queue.SimpleQueue[tuple[Process, Message | None]]") -> None:
        self._pipe, theirs = Pipe()
        program = PROGRAM.format(path=sys.path, parent=os.getpid(), handle=theirs.fileno())
        self.slot = slot
        self.given: Given | None = None
        self.title = ""
        self.needs: tuple[str, ...] = ()
        self.ready = self.stopped = False
        self._heard = heard
        self._process = subprocess.Popen(  # noqa: S603 - this very Python
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,  # what a library prints is none of the command's results
            env={**os.environ, **slot.environment},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        threading.Thread(target=self._wait, args=[listener], daemon=True).start()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._heard.put((self, self._pipe.recv()))

    def _wait(self, listener: threading.Thread) -> None:
        """Tell of its end after all that it said. A process that it left behind may hold the pipe open."""
        self._process.wait()
        listener.join(PATIENCE)
        self._heard.put((self, None))

    def send(self, message: Any) -> None:
        with suppress(OSError):  # that it is gone is heard
            self._pipe.send(message)

    def end(self) -> None:
        """End it at once."""
        self._process.kill()  # it has nothing under way that is worth keeping, or was told to stop and is not waited for
        self._process.wait()

    def ends(self, within: float) -> bool:
        """Whether it is gone, or is within so many seconds."""
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def killed(self) -> bool:
        """Whether a signal ended it. Ask after it was waited for."""
        return (self._process.returncode or 0) < 0

    def lost(self) -> LostError:
        """Why it is gone, after it was waited for."""
        code = self._process.returncode
        if self.stopped:
            why = "was told to stop"
        elif code == -signal.SIGKILL:
            why = "was killed, as a machine does that runs out of memory"
        else:
            why = f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return LostError(f"{self.title}: its process on {self.slot.told} {why}; {GO_ON}")


Heard = queue.SimpleQueue[tuple[Process, Message | None]]  # None: the process ended


def awaited(
    heard: Heard,
    understood: Callable[[Process, Message | None], Event | None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Event:
    """The next thing of note that processes say; a stop that is asked for meanwhile is obeyed. meanwhile: called now and then."""
    with STOP.looked_for():
        while True:
            meanwhile()
            try:
                process, message = heard.get(timeout=LOOKED_FOR)
            except queue.Empty:
                STOP.obey()
                continue
            if (event := understood(process, message)) is not None:
                return event


class Processes:
    """A team of processes, each started when there is a stage for it."""

    def __init__(self, slots: list[Slot], begun: Run, watcher: Watcher) -> None:
        self.session = Session(begun.base, watcher)  # which loads no model
        self._slots = slots
        self._heard: Heard = queue.SimpleQueue()
        self._processes: list[Process] = []
        self._lending: Lending[Process] = Lending()
        self._jobs: dict[Process, Job] = {}  # of those that make a stage

    @property
    def room(self) -> bool:
        return len(self._busy) < len(self._slots)

    @property
    def _busy(self) -> list[Process]:
        return [process for process in self._processes if process.given is not None]

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        process = self._free(stage)
        process.given, process.title = Given(begun.graph.folder, stage.name), stage.title
        process.needs = stage.needs
        self._lending.leave(process)
        job = job_of(begun, stage.name)
        if stage.shown is not None and len(self._slots) > 1:
            job = self._lending.begin(process.given, job, stage.title, stage.needs)
        self._jobs[process] = job
        process.send(job)

    def _free(self, stage: Stage[Session]) -> Process:
        """One that made a stage of the same model, else any that waits or helps, else a new one."""
        waiting = [process for process in self._processes if process.given is None]
        if waiting:
            return min(waiting, key=lambda process: (*self._busy_with_batches(process), process.needs != stage.needs))
        return self._started()

    def _busy_with_batches(self, process: Process) -> tuple[bool, bool]:
        return self._lending.leaves(process), self._lending.helps(process)

    def _meanwhile(self) -> None:
        """Take what helps out of the way where it stands still, and have those that have nothing to make help the others."""
        for process in [each for each in self._processes if self._lending.stands_still(each)]:
            self._replace(process)
        self._lend()

    def _replace(self, process: Process) -> None:
        """End a process that is at a batch and does not come back from it; another makes the stage that waits for it."""
        given, job = process.given, self._jobs.pop(process, None)
        self._processes.remove(process)
        process.given = None
        process.end()
        self._lending.lost(process, "it stands still")
        logging.getLogger("spunge").warning("execution: a process stood still at another's batch, and was ended")
        if given is not None and job is not None:
            other = self._started()
            other.given, other.title, other.needs = given, process.title, process.needs
            self._jobs[other] = job
            other.send(job)

    def _started(self) -> Process:
        """A new process. There must be a slot for one."""
        taken = [process.slot for process in self._processes]
        free = [slot for slot in self._slots if taken.count(slot) < self._slots.count(slot)]
        self._processes.append(Process(free[0], self._heard))
        return self._processes[-1]

    def _lend(self) -> None:
        """Have those that have nothing to make help the others."""
        while (given := self._lending.wanting()) is not None:
            idle = [each for each in self._processes if each.given is None and not any(self._busy_with_batches(each))]
            if not idle and len(self._processes) == len(self._slots):
                return
            process = idle[0] if idle else self._started()
            process.needs = self._lending.lend(process, given)

    def told(self) -> Event:
        return awaited(self._heard, self._understood, self._meanwhile)

    def wound_down(self) -> Iterator[Event]:
        for process in self._busy:
            process.send(Stop())
        while self._busy:
            process, message = self._heard.get()
            event = None
            with suppress(LostError):  # it ended as it began: the stop is what is told
                event = self._understood(process, message)
            if event is not None:
                yield event

    def _understood(self, process: Process, message: Message | None) -> Event | None:
        """What a message says of the stage that is made; None where it says nothing of it. None as a message: the process ended."""
        given = process.given
        if isinstance(message, Said):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, Ready | Stopped):
            process.ready, process.stopped = True, isinstance(message, Stopped)
        elif isinstance(message, Left):
            self._lending.left(process, message.number)
        elif isinstance(message, GaveUp):
            self._lending.lost(process, message.error)
        elif isinstance(message, Begun) and given is not None:
            return Event(given)
        elif isinstance(message, Step) and given is not None:
            return Event(given, step=(message.done, message.total, message.note))
        elif isinstance(message, Done | Failed) and given is not None:
            process.given = None
            self._jobs.pop(process, None)
            self._lending.end(given)
            if isinstance(message, Failed):
                self._processes.remove(process)  # it ends by itself
                return Event(given, error=raisable(message))
            return Event(given, done=message)
        elif message is None and process in self._processes:
            self._processes.remove(process)
            process.given = None
            self._jobs.pop(process, None)
            self._lending.lost(process, "it ended")
            if given is not None:
                self._lending.end(given)
            if not process.ready and given is not None:
                raise LostError(f"execution: a process ended as it began ({process.slot.told}); its own lines say why")
            return None if given is None else Event(given, error=process.lost())
        return None

    def end(self) -> None:
        for process in self._processes:
            process.end()
        self._lending.close()


@contextmanager
def processes(settings: ProcessesSettings, begun: Run, watcher: Watcher) -> Iterator[Processes]:
    """Several processes of this machine, each with a device of its own."""
    team = Processes(slots(settings, begun.recipe.model), begun, watcher)
    try:
        yield team
    finally:
        team.end()


def at_once(settings: ProcessesSettings, model: ModelSettings) -> int:
    return len(slots(settings, model))


def elsewhere(settings: ProcessesSettings, model: ModelSettings) -> tuple[int, int] | None:
    devices = settings.devices
    if devices == "auto" or not _named_once(devices):  # what is wrong anywhere is refused as here
        return None
    return len(devices) * settings.per_device, 1


PROCESSES = Executor(ProcessesSettings, "spunge", at_once, processes, elsewhere=elsewhere)
