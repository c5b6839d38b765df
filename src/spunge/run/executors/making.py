"""Making one stage, wherever that is: what a process is told that does not hold the run itself, and what it gives back."""

import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError
from spunge.files import disk_errors_told, fingerprint
from spunge.model.loading import bfloat16_speedup, know_bfloat16_speedup, pick_device
from spunge.model.ranks import Seat, seated
from spunge.progress import Watcher
from spunge.recipe.explanation import validated
from spunge.recipe.schema import Recipe
from spunge.run.executors.executor import Done
from spunge.run.graph import NotMadeError, Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run, build
from spunge.run.stages.naming import RunGraph
from spunge.run.stamps import marks_of


class Job(NamedTuple):
    """All that another process needs to make a stage."""

    folder: Path
    recipe: Mapping[str, Any]
    written: bool  # whether the merged model becomes a checkpoint
    stage: str
    keys: Mapping[str, str]  # every key that is known
    weights: str | None  # the base's fingerprint, which takes reading all of it
    bfloat16: (
        float | None
    )  # its speed on the CPU where the dtype depends on it: measured again, it may lead to another one
    seat: Seat | None = None  # where it is made by several processes together


def job_of(begun: Run, stage: str) -> Job:
    """What a process is told that is to make a stage."""
    recipe = begun.recipe
    begun.graph.key(stage)
    on_cpu = recipe.model.dtype == "auto" and pick_device(recipe.model.device).type == "cpu"
    return Job(
        folder=begun.graph.folder,
        recipe=recipe.model_dump(mode="json"),
        written=begun.written,
        stage=stage,
        keys=begun.graph.known(),
        weights=begun.base.known_weights,
        bfloat16=bfloat16_speedup() if on_cpu else None,
    )


class Maker:
    """Makes stages for another process. The run and the base stay in memory from one stage to the next."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._of: tuple[Path, str] | None = None  # whose run that is
        self._begun: Run | None = None
        self._session: Session | None = None

    def make(self, job: Job) -> Done:
        """Make a stage. Raises RecipeError where its rows or files are no longer those that its key was made of."""
        with disk_errors_told(job.folder):
            if job.bfloat16 is not None:
                know_bfloat16_speedup(job.bfloat16)
            begun = self._run_of(job)
            graph = begun.graph
            graph.know(job.keys)
            if job.weights is not None:
                begun.base.weights = job.weights
            _refuse_changed(graph, job)
            if job.seat is not None:
                return self._made_together(begun, job, job.seat)
            if self._session is None:
                self._session = Session(begun.base, self._watcher)
            self._session.turn_to(begun.base)
            return made(graph, graph.stages[job.stage], self._session)

    def _made_together(self, begun: Run, job: Job, seat: Seat) -> Done:
        """Make a stage with other processes. What is in memory goes: a model that was shared out is of no use afterwards."""
        self._session = None
        gc.collect()
        with seated(seat) as ranks:
            done = made(begun.graph, begun.graph.stages[job.stage], Session(begun.base, self._watcher, ranks))
        gc.collect()
        return done

    def _run_of(self, job: Job) -> Run:
        of = (job.folder, fingerprint([job.recipe, job.written]))
        if self._begun is None or self._of != of:
            self._begun, self._of = build(validated(Recipe, job.recipe), job.folder, job.written), of
        return self._begun


def _refuse_changed(graph: RunGraph, job: Job) -> None:
    """The rows were read anew: what is made of others must not be taken for what the key says."""
    try:
        same = fingerprint(graph.inputs(job.stage)) == job.keys[job.stage]
    except (KeyError, NotMadeError):
        same = False
    if not same:
        raise RecipeError(
            f"{job.stage}: its rows or files changed while the run was at work; give the same command again"
        )


def made(graph: RunGraph, stage: Stage[Session], session: Session) -> Done:
    """Make a stage, all of whose needs are done, with what is in this process's memory."""
    assert stage.make is not None
    started = time.perf_counter()
    left = stage.make(session)
    seconds = time.perf_counter() - started
    return Done(marks_of(graph.folder, left.files, left.byproducts), left.outcome, seconds, session.used)
