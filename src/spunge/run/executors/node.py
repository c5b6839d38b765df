"""What runs on the nodes of a Ray cluster: actors that make stages, and one that hears how far they are. Needs Ray.

Ray sends an actor's class whole, with what its methods name. So the actors' own classes name one thing each, which a node
imports from the spunge that is installed there: what is one for a process, such as `STOP`, must not come along as a copy.
"""

import asyncio
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from spunge import __version__
from spunge.errors import RecipeError, is_panic
from spunge.run.executors.bringing import Brought, Bundle, Mirror
from spunge.run.executors.channel import Begun, Failed, Forward, Ready, Said, Step, Stopped, Telling, failure
from spunge.run.executors.executor import Done, Given
from spunge.run.executors.making import Job, Maker
from spunge.stopping import STOP

News = Ready | Begun | Step | Said
EVERY = 0.5  # seconds between two steps that are told
STOPPING = "stopping"  # the group of calls that are heard while another is at work
HELD = 1000  # messages that are held while nobody asks for them


class Seen(NamedTuple):
    """By what a node knows that it sees the run's folder, and has the same spunge."""

    file: Path | None  # None: what it needs is brought to it
    token: str
    version: str

    def refuse(self) -> None:
        """Raises RecipeError on a node that does not."""
        if self.version != __version__:
            raise RecipeError(
                f"execution.kind: ray: a node has spunge {__version__}, and this one {self.version}; install the same on all"
            )
        if self.file is None:
            return
        try:
            seen = self.file.read_text(encoding="utf-8")
        except OSError:
            seen = ""
        if seen != self.token:
            raise RecipeError(
                f"--out: a node does not see {str(self.file.parent)!r}; give a folder that all nodes share, under the same path"
            )


class Messages:
    """Messages of all actors, for the one that gives the stages out."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[tuple[Given, News]] = asyncio.Queue(HELD)

    async def put(self, given: Given, message: News) -> None:
        if not self._messages.full():
            self._messages.put_nowait((given, message))

    async def take(self) -> list[tuple[Given, News]]:
        """All that there are; waits for one."""
        taken = [await self._messages.get()]
        while not self._messages.empty():
            taken.append(self._messages.get_nowait())
        return taken


class AtWork:
    """Makes one stage after the other, and hears meanwhile that it is to stop."""

    def __init__(self) -> None:
        self._inbox: Any = None
        self._given: Given | None = None
        self._mirrors: dict[Path, Mirror] = {}  # of each run
        self._maker = Maker(Telling(self._say, EVERY))
        forward = Forward(self._say)
        forward.addFilter(lambda record: not record.name.startswith("ray"))
        logging.captureWarnings(True)
        logging.getLogger().addHandler(forward)

    def make(
        self, job: Job, given: Given, seen: Seen, bundle: Bundle | None, inbox: Any
    ) -> Done | Brought | Failed | Stopped:
        self._given, self._inbox = given, inbox
        self._say(Ready())
        try:
            seen.refuse()
            return self._maker.make(job) if bundle is None else self._brought(job, bundle)
        except KeyboardInterrupt:
            return Stopped()
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            return Stopped() if STOP.asked else failure(error)

    def _brought(self, job: Job, bundle: Bundle) -> Brought:
        """Make a stage in a mirror of the run's folder. What it saved of one that is stopped is put before that is told."""
        if job.folder not in self._mirrors:
            self._mirrors[job.folder] = Mirror()
        mirror = self._mirrors[job.folder]
        try:
            with mirror.laid_out(bundle):
                done = self._maker.make(job._replace(folder=mirror.folder))
            return Brought(done, mirror.put_new(bundle))
        except KeyboardInterrupt:
            mirror.save(bundle)
            raise

    def stop(self) -> bool:
        """Ask what trains to end after its step, with its state saved. Whether anything looks for that."""
        return STOP.ask()

    def _say(self, message: News) -> None:
        if self._given is not None:
            self._inbox.put.remote(self._given, message)


@cache
def node_class() -> Any:
    """The actor that makes stages. Its stop() is heard while it makes one; lost, it is not started again by Ray."""
    import ray

    class Node:
        def __init__(self) -> None:
            self.work = AtWork()

        def make(self, job: Any, given: Any, seen: Any, bundle: Any, inbox: Any) -> Any:
            return self.work.make(job, given, seen, bundle, inbox)

        def stop(self) -> bool:
            return self.work.stop()

    return ray.remote(concurrency_groups={STOPPING: 1}, max_restarts=0)(Node)


@cache
def inbox_class() -> Any:
    """The actor that hears how far stages are; it takes no CPU."""
    import ray

    class Inbox:
        def __init__(self) -> None:
            self.messages = Messages()

        async def put(self, given: Any, message: Any) -> None:
            await self.messages.put(given, message)

        async def take(self) -> Any:
            return await self.messages.take()

    return ray.remote(num_cpus=0, max_restarts=0)(Inbox)
