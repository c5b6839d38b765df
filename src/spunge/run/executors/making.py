"""Making one stage, wherever that is: what a process is told that does not hold the run itself, and what it gives back."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError
from spunge.files import disk_errors_told, fingerprint
from spunge.model.board import Board, take_part
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
    board: Path | None = None  # a folder where other processes may take batches of it


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
            begun = self._known(job)
            graph = begun.graph
            if job.seat is not None:
                return self._made_together(begun, job, job.seat)
            session = self._turned_to(begun)
            session.board = None if job.board is None else Board(job.board)
            self._watcher.begin(graph.stages[job.stage].title)
            return made(graph, graph.stages[job.stage], session)

    def help(self, job: Job, leaves: Callable[[], bool]) -> None:
        """Take batches of a stage that another process makes, until `leaves` says so. Raises RecipeError as `make` does."""
        begun = self._known(job)
        shown = begun.graph.stages[job.stage].shown
        assert shown is not None
        assert job.board is not None
        try:
            take_part(shown(self._turned_to(begun)), job.board, leaves)
        except BaseException:
            self._session = None  # what an error leaves in memory is not worked with
            raise

    def _turned_to(self, begun: Run) -> Session:
        if self._session is None:
            self._session = Session(begun.base, self._watcher)
        self._session.turn_to(begun.base)
        return self._session

    def _known(self, job: Job) -> Run:
        """The run of a job, with what the other process knows of it."""
        if job.bfloat16 is not None:
            know_bfloat16_speedup(job.bfloat16)
        begun = self._run_of(job)
        begun.graph.know(job.keys)
        if job.weights is not None:
            begun.base.weights = job.weights
        _refuse_changed(begun.graph, job)
        return begun

    def _made_together(self, begun: Run, job: Job, seat: Seat) -> Done:
        """Make a stage with other processes. What is in memory goes: a model that was shared out is of no use afterwards."""
        self._session = None
        gc.collect()
        with seated(seat) as ranks:
            self._watcher.begin(begun.graph.stages[job.stage].title)
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
