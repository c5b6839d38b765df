"""A process that makes stages for another one, which holds the run's lock and writes its stamps.

It ends with the other process, at once: what trains has its state on the disk, and the next command may be at work already.
"""

import ctypes
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeAlias

from spunge.errors import first_line, is_panic
from spunge.run.executors.channel import (
    Forward,
    GaveUp,
    Help,
    Leave,
    Left,
    Ready,
    Speaker,
    Stop,
    Stopped,
    Telling,
    failure,
)
from spunge.run.executors.making import Job, Maker
from spunge.stopping import STOP

AGAIN = 0.5  # seconds after which an interrupt comes again that was swallowed, or came while a message was sent
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
Jobs: TypeAlias = "queue.SimpleQueue[Job | Help | None]"


def main(parent: int, handle: int) -> None:
    """Make the stages that come through a pipe until there are no more. parent: the process that this one must not outlive."""
    die_with(parent)
    os.set_inheritable(handle, False)
    pipe: Connection[Any, Any] = Connection(handle)
    speaker = Speaker(pipe)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(Forward(speaker.say))
    jobs: Jobs = queue.SimpleQueue()
    stopping, helping = Stopping(speaker, jobs), Helping()
    threading.Thread(target=_listen, args=(pipe, jobs, stopping, helping), daemon=True).start()
    code = 1
    try:
        speaker.say(Ready())
        code = _work(jobs, speaker, helping)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        speaker.say(Stopped())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no thread of a library, and no interrupt that is still to come, changes anything any more


class Helping:
    """Which requests for help are over."""

    def __init__(self) -> None:
        self.last = 0  # the number of the last one that is over

    def is_over(self, asked: Help) -> bool:
        return asked.number <= self.last


def _work(jobs: Jobs, speaker: Speaker, helping: Helping) -> int:
    """Until no more comes, or one fails: what an error leaves in memory, and on a device, is not worked with."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    maker = Maker(Telling(speaker.say))
    while (job := jobs.get()) is not None:
        try:
            if isinstance(job, Help):
                _help(maker, job, helping, speaker)
                continue
            done = maker.make(job)
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            if STOP.asked:  # libraries turn an interrupt into errors of their own
                raise KeyboardInterrupt from None
            speaker.say(failure(error))
            return 1
        speaker.say(done)
    return 0


def _help(maker: Maker, asked: Help, helping: Helping, speaker: Speaker) -> None:
    try:
        maker.help(asked.job, lambda: helping.is_over(asked))
    except Exception as error:
        if STOP.asked:
            raise
        speaker.say(GaveUp(f"{type(error).__name__}: {first_line(error)}"))
        return
    speaker.say(Left(asked.number))


def die_with(parent: int) -> None:
    """Have the system kill this process when the other one ends, also where no thread of Python gets to see it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _listen(pipe: "Connection[Any, Any]", jobs: Jobs, stopping: "Stopping", helping: Helping) -> None:
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if isinstance(message, Stop):
            stopping.begin()
        elif isinstance(message, Leave):
            helping.last = message.number
        else:
            jobs.put(message)


class Stopping:
    """A stop is asked for, by the other process or by a scheduler that signals every process; Ctrl-C is for the other process."""

    def __init__(self, speaker: Speaker, jobs: Jobs) -> None:
        self._speaker = speaker
        self._jobs = jobs
        self._main = threading.main_thread().ident
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, lambda number, frame: self.begin())
        if sys.platform != "win32":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def begin(self) -> None:
        """Ask for it, again and again."""
        self._jobs.put(None)
        threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        while True:
            if not STOP.ask() and self._main is not None:
                signal.pthread_kill(self._main, signal.SIGINT)
            time.sleep(AGAIN)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Where a training looks for the stop, an interrupt would take what it has not kept yet: a terminal's Ctrl-C may be heard
        here after the other process has asked for the stop."""
        if STOP.asked and not STOP.ask() and not self._speaker.busy:
            raise KeyboardInterrupt
