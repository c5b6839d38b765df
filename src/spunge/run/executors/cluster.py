"""A Ray cluster makes the stages, in actors that hold a model from one stage to the next.

    execution: {kind: ray, address: auto, resources: {gpu: 1}}

All nodes see the run's folder, and the model's, under the same path; or, with `artifacts: s3://bucket/folder`, what they need is
brought to them. Where an actor is gone, with its node or alone, its stage goes on elsewhere from the state that was saved last.
"""

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spunge import __version__
from spunge.errors import LostError, first_line, one_line
from spunge.files import write_text
from spunge.progress import Watcher
from spunge.recipe.schema import Recipe
from spunge.run.executors.artifacts import refuse_address
from spunge.run.executors.bringing import Brought, Courier, named_here
from spunge.run.executors.channel import Begun, Failed, Said, Step, raisable
from spunge.run.executors.executor import Done, Event, Executor, Given
from spunge.run.executors.making import job_of
from spunge.run.executors.node import STOPPING, Seen, inbox_class, node_class
from spunge.run.executors.nodes import NAMESPACE, RaySettings, at_once, connected, needed, nodes_of, places
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run
from spunge.stopping import STOP

LOOKED_FOR = 0.2  # seconds after which a stop is looked for
COUNTED = 5.0  # seconds for which the cluster's nodes are taken to be the same
PATIENCE = (
    60.0  # seconds after which it is said that no node has room; and that what an earlier command left is given to end
)
HANDED_ON = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "SPUNGE_CACHE",
    "OMP_NUM_THREADS",
)
OWN = ("HF_HOME", "SPUNGE_CACHE")  # folders that a node has of its own, where it shares none
SEEN = "seen-by-nodes.part"  # in RUN, while a cluster is at work: by it a node knows the folder
GO_ON = "the same command goes on from what is finished"


class _Task(NamedTuple):
    """A stage that is to be made. tries: how often it was taken up again."""

    begun: Run
    stage: Stage[Session]
    tries: int = 0

    @property
    def given(self) -> Given:
        return Given(self.begun.graph.folder, self.stage.name)


@dataclass
class _Actor:
    """An actor, and the stage that it makes. needs: of the stage that it made last, whose model it still holds."""

    handle: Any
    since: float
    task: _Task | None = None
    result: Any = None  # what will hold how the stage ended
    needs: tuple[str, ...] = ()
    heard: bool = False

    def is_late(self, seconds: float) -> bool:
        """Whether nothing was ever heard of it for so long."""
        return not self.heard and time.monotonic() - self.since > seconds


class Cluster:
    """A team of actors, each started when there is a stage for it."""

    def __init__(self, settings: RaySettings, begun: Run, watcher: Watcher) -> None:
        self.session = Session(begun.base, watcher)  # which loads no model
        self._settings = settings
        self._model = begun.recipe.model
        self._mark = hashlib.sha256(str(begun.graph.folder).encode()).hexdigest()[:16]
        self._actors: list[_Actor] = []
        self._again: list[_Task] = []  # whose actors are gone
        self._events: deque[Event] = deque()
        self._counted = (float("-inf"), 0)
        self._seen: dict[Path, Seen] = {}
        self._number = 0
        self._courier = Courier(settings.artifacts) if settings.artifacts else None
        _end_earlier(self._mark)
        self._inbox = _inbox()
        self._news = self._inbox.take.remote()

    @property
    def room(self) -> bool:
        return len(self._busy) + len(self._again) < max(1, self._places())

    @property
    def _busy(self) -> list[tuple[_Task, _Actor]]:
        return [(actor.task, actor) for actor in self._actors if actor.task is not None]

    def _places(self) -> int:
        """How many stages there is room for: nodes come and go."""
        when, count = self._counted
        if time.monotonic() - when > COUNTED:
            nodes = nodes_of()
            count = places(needed(self._settings, self._model, nodes), nodes)
            self._counted = (time.monotonic(), count)
        return count

    def give(self, begun: Run, stage: Stage[Session]) -> None:
        self._assign(_Task(begun, stage))

    def _assign(self, task: _Task) -> None:
        """Have a stage made by an actor that waits, if there is one: it holds its node's resources."""
        waiting = [actor for actor in self._actors if actor.task is None]
        actor = min(waiting, key=lambda each: each.needs != task.stage.needs) if waiting else self._new()
        actor.task, actor.needs = task, task.stage.needs
        job = job_of(task.begun, task.stage.name)
        bundle = self._courier.bundle(task.begun, task.stage) if self._courier else None
        actor.result = actor.handle.make.remote(
            job, task.given, self._known_by(task.begun.graph.folder), bundle, self._inbox
        )

    def _known_by(self, folder: Path) -> Seen:
        """By what a node knows that it can make stages of a run."""
        if folder not in self._seen:
            file = None if self._courier else folder / SEEN
            self._seen[folder] = Seen(file, os.urandom(8).hex(), __version__)
            if file is not None:
                write_text(file, self._seen[folder].token)
        return self._seen[folder]

    def _new(self) -> _Actor:
        needs = needed(self._settings, self._model, nodes_of())
        self._number += 1
        own = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
        names = [name for name in HANDED_ON if name in os.environ and not (self._courier and name in OWN)]
        environment = {name: os.environ[name] for name in names}
        handle = (
            node_class()
            .options(
                name=f"{self._mark}-{os.getpid()}-{self._number}",
                namespace=NAMESPACE,
                num_cpus=needs.get("CPU", 0),
                num_gpus=needs.get("GPU", 0),
                memory=needs.get("memory"),
                resources=own or None,
                runtime_env={"env_vars": environment} if environment else None,
            )
            .remote()
        )
        self._actors.append(_Actor(handle, time.monotonic()))
        return self._actors[-1]

    def told(self) -> Event:
        with STOP.looked_for():
            while not self._events:
                self._listen()
                STOP.obey()
            return self._events.popleft()

    def _listen(self) -> None:
        """Wait for what is told next, a moment at the most."""
        import ray

        while self._again and (len(self._busy) < len(self._actors) or len(self._actors) < self._places()):
            self._assign(self._again.pop(0))
        ends = {actor.result: actor for _, actor in self._busy}
        ready, _ = ray.wait([*ends, self._news], num_returns=1, timeout=LOOKED_FOR)
        for each in ready:
            if each == self._news:
                self._hear_news()
            else:
                self._hear_end(ends[each])
        self._hand_over()
        self._tell_waiting()

    def _hand_over(self) -> None:
        """Have actors that are free make what waits for others to begin: no node may have room for these, while the free ones
        hold it, as where a node went that was still counted."""
        waiting = [(task, actor) for task, actor in self._busy if actor.is_late(COUNTED)]
        free = sum(actor.task is None for actor in self._actors)
        for task, actor in waiting[:free]:
            self._end(actor)
            self._assign(task)

    def _hear_news(self) -> None:
        import ray

        try:
            news = ray.get(self._news)
        except ray.exceptions.RayError:  # its node is gone: what is made from now on is told to another
            self._inbox = _inbox()
            news = []
        self._news = self._inbox.take.remote()
        at_work = {task.given: actor for task, actor in self._busy}
        for given, message in news:
            if isinstance(message, Said):
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            elif given in at_work:
                at_work[given].heard = True
                if isinstance(message, Begun):
                    self._events.append(Event(given))
                elif isinstance(message, Step):
                    self._events.append(Event(given, step=(message.done, message.total, message.note)))

    def _hear_end(self, actor: _Actor) -> None:
        import ray

        task, actor.task = actor.task, None
        assert task is not None
        try:
            ended = self._brought(task, ray.get(actor.result))
        except (ray.exceptions.RayError, LostError) as error:
            self._end(actor)
            self._take_up_again(task, first_line(error))
            return
        if self._courier and isinstance(ended, Failed) and isinstance(ended.error, LostError):
            self._end(actor)  # what it needs did not come whole
            self._take_up_again(task, first_line(ended.error))
            return
        if isinstance(ended, Done):
            self._events.append(Event(task.given, done=ended))
            return
        self._end(actor)  # what an error leaves in memory is not worked with
        if isinstance(ended, Failed):
            self._events.append(Event(task.given, error=raisable(ended)))
        else:
            stopped = LostError(f"{task.stage.title}: its process was told to stop; {GO_ON}")
            self._events.append(Event(task.given, error=stopped))

    def _brought(self, task: _Task, ended: Any) -> Any:
        """How a stage ended; what a node made that shares no folder lies in RUN then. Raises LostError where it does not come."""
        if self._courier is None or not isinstance(ended, Brought):
            return ended
        return self._courier.bring(task.begun, task.stage, ended)

    def _take_up_again(self, task: _Task, why: str) -> None:
        """Have a stage go on elsewhere whose actor is gone, with its node or alone; or say that it was tried enough."""
        title = task.stage.title
        if task.tries >= self._settings.retries:
            error = LostError(f"{title}: its node or process is gone ({why}); {GO_ON}")
            self._events.append(Event(task.given, error=error))
            return
        logging.getLogger("spunge").warning(
            one_line(f"{title}: its node or process is gone ({why}); it goes on elsewhere")
        )
        self._counted = (float("-inf"), 0)
        self._again.append(task._replace(tries=task.tries + 1))

    def _tell_waiting(self) -> None:
        """Say once of each actor that no node has room for it."""
        for task, actor in self._busy:
            if actor.is_late(PATIENCE):
                actor.heard = True
                needs = needed(self._settings, self._model, nodes_of())
                said = f"{task.stage.title}: waits for a node with {needs}, or for its process to begin"
                logging.getLogger("spunge").warning(one_line(said))

    def wound_down(self) -> Iterator[Event]:
        import ray

        yield from (event for event in self._events if event.done is not None)  # heard, and not told yet
        self._events.clear()
        stopped = [*self._again, *(task for task, _ in self._busy)]
        self._again.clear()
        asked = {actor.handle.stop.options(concurrency_group=STOPPING).remote(): actor for _, actor in self._busy}
        for answer, actor in asked.items():
            looks = False
            with suppress(ray.exceptions.RayError):  # one that has not begun yet answers nothing
                looks = ray.get(answer, timeout=PATIENCE if actor.heard else LOOKED_FOR)
            if not looks and not ray.wait([actor.result], timeout=0)[0]:
                self._end(actor)
        while busy := self._busy:
            ready, _ = ray.wait([actor.result for _, actor in busy], num_returns=1)
            for task, actor in busy:
                if actor.result in ready:
                    actor.task = None
                    with suppress(ray.exceptions.RayError, LostError):
                        if isinstance(ended := self._brought(task, ray.get(actor.result)), Done):
                            yield Event(task.given, done=ended)
        for task in stopped:
            if self._courier is not None:
                with suppress(LostError):  # they stay noted at the address
                    self._courier.bring_states(task.begun, task.stage)

    def _end(self, actor: _Actor) -> None:
        import ray

        self._actors.remove(actor)
        ray.kill(actor.handle, no_restart=True)

    def end(self) -> None:
        import ray

        for actor in list(self._actors):
            self._end(actor)
        ray.kill(self._inbox)
        for seen in self._seen.values():
            if seen.file is not None:
                seen.file.unlink(missing_ok=True)


def _inbox() -> Any:
    """On this very node, if it is one: it is gone when this process's node is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return inbox_class().options(scheduling_strategy=here).remote()


def _end_earlier(mark: str) -> None:
    """End what a command that was killed left at work on the same folder. Ray does so too, a moment later."""
    import ray

    stop = time.monotonic() + PATIENCE
    while time.monotonic() < stop:
        left = [
            each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE
        ]
        left = [name for name in left if name.startswith(f"{mark}-")]
        if not left:
            return
        for name in left:
            with suppress(ValueError, ray.exceptions.RayError):
                ray.kill(ray.get_actor(name, NAMESPACE))
        time.sleep(0.1)


@contextmanager
def cluster(settings: RaySettings, begun: Run, watcher: Watcher) -> Iterator[Cluster]:
    """A Ray cluster, whose nodes share the run's folder; a stage whose node is gone goes on at another."""
    with connected(settings):
        team = Cluster(settings, begun, watcher)
        try:
            yield team
        finally:
            team.end()


def refuse(recipe: Recipe) -> None:
    """Raises RecipeError for an address that is none, and for what cannot be brought to the nodes through one."""
    settings = recipe.execution
    if isinstance(settings, RaySettings) and settings.artifacts is not None:
        refuse_address(settings.artifacts)
        named_here(recipe)


RAY = Executor(RaySettings, "Ray", at_once, cluster, refuse=refuse)
