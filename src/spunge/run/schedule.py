"""The order of work: which stage of a run can be made now. A team makes it (`run.executors`), and what it made is vouched for here.

One process writes stamps, tells people and decides, whoever makes the stages.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spunge.errors import RecipeError, first_line
from spunge.progress import Expected, Watcher
from spunge.run.costs import expected
from spunge.run.executors.executor import Done, Event, Given, Team
from spunge.run.executors.making import made
from spunge.run.graph import Stage, State
from spunge.run.session import Session, Used
from spunge.run.sharing import take
from spunge.run.space import refuse_full
from spunge.run.stages.building import Run
from spunge.run.stages.naming import RunGraph
from spunge.run.stages.unfinished import refuse_losing
from spunge.run.stamps import stamp_file
from spunge.run.texts import drop_judged


def of_every_run(error: RecipeError) -> bool:
    return False


class Schedule:
    """What is still to be made of one run. others: folders of runs that finished stages of the same key are taken from.

    own: whether an error is of this run alone, so that others that are made beside it go on; then it is in `refused`.
    """

    def __init__(
        self,
        begun: Run,
        watcher: Watcher,
        replace: bool = False,
        others: Sequence[Path] = (),
        own: Callable[[RecipeError], bool] = of_every_run,
    ) -> None:
        self.begun = begun
        self.refused: RecipeError | None = None
        self._own = own
        self._watcher = watcher
        self._replace = replace
        self._others = others
        self._waiting = dict(begun.graph.stages)
        self._over: set[str] = set()
        self._used: dict[str, Used] = {}

    @property
    def folder(self) -> Path:
        return self.begun.graph.folder

    def take_finished(self) -> None:
        """Take what other runs have finished, and tidy up beside what is done."""
        graph = self.begun.graph
        for name in graph.stages:
            if graph.state(name).done or take(graph, name, self._others, self._watcher):
                graph.tidy(name)

    def ready(self, elsewhere: Callable[[str], bool]) -> Iterator[Stage[Session]]:
        """The stages that are to be made and of which all that they need is done, in the graph's order. Each is given out once.

        elsewhere: whether another run is at a stage of that key; it is taken from there when it is done.
        """
        graph = self.begun.graph
        for stage in list(self._waiting.values()):
            if not self._over.issuperset((*stage.needs, *stage.after)):
                continue
            if stage.make is not None and elsewhere(graph.key(stage.name)):
                continue
            del self._waiting[stage.name]
            if (
                stage.make is None
                or graph.state(stage.name).done
                or take(graph, stage.name, self._others, self._watcher)
            ):
                self._over.add(stage.name)
            else:
                yield stage

    def make_room(self, stage: Stage[Session]) -> None:
        """For a stage's files, and say why where it is made again."""
        refuse_full(self.begun, [stage], f"{stage.title!r}")
        state = self.begun.graph.state(stage.name)
        if state.kind in ("stale", "damaged"):
            self._watcher.begin(f"again: {stage.title}")
            self._watcher.end(state.why)
        _clear(self.begun.graph, stage, state)

    def end(self, name: str, done: Done) -> None:
        """Vouch for a stage's files."""
        self.begun.graph.vouch(name, done.marks, done.seconds)
        self._over.add(name)
        self._used[name] = done.used
        self._watcher.end(done.outcome)
        if not self._replace and name in (*self.begun.makes_base, *self.begun.asks):
            refuse_losing(self.begun)  # what is made from the base, or from an answer, is known by its content
        if (keep := self.begun.recipe.keep_texts) != "all" and "judge:" in name:
            drop_judged(self.begun, keep)

    def refuse(self, error: RecipeError) -> None:
        """Make nothing more of this run. Raises the error where it is not of this run alone."""
        if not self._own(error):
            raise error
        self.refused = self.refused or error
        self._waiting.clear()

    def make_light(self, stage: Stage[Session], session: Session) -> None:
        """Make a stage that takes no model, in this process."""
        self._watcher.begin(stage.title)
        session.used_elsewhere([self._used[name] for name in self.begun.graph.stages if name in self._used])
        self.end(stage.name, made(self.begun.graph, stage, session))


def make_all(schedules: Sequence[Schedule], team: Team, watcher: Watcher) -> None:
    """Make what is still to be made of some runs. A stage that fails without being wrong for all, such as one whose process was
    killed, keeps back only those that need it; then its error is raised at the end."""
    watcher.expect(
        [
            # Of a base that is still to be converted no shape is known.
            expected(stage) if schedule.begun.base.untaught.is_dir() else Expected(stage.title, "disk", math.inf)
            for schedule in schedules
            for stage in schedule.begun.graph.to_do()
        ]
    )
    work = _Work({schedule.folder: schedule for schedule in schedules}, team, watcher)
    try:
        while work.given_out():
            work.hear(team.told())
    except BaseException:
        for event in team.wound_down():
            if event.done is not None:
                work.hear(event)
        raise
    if work.failed:
        raise work.failed[0]


class _Work:
    """The stages that a team is at."""

    def __init__(self, schedules: dict[Path, Schedule], team: Team, watcher: Watcher) -> None:
        self.schedules = schedules
        self.failed: list[Exception] = []
        self._team = team
        self._watcher = watcher
        self._at: dict[Given, Stage[Session]] = {}
        self._told: Given | None = None  # the stage that the watcher was last told of
        self._ready: list[tuple[Schedule, Stage[Session]]] = []
        self._keys: dict[str, Schedule] = {}  # of what is ready or under way
        order = [(schedule.folder, name) for schedule in schedules.values() for name in schedule.begun.graph.stages]
        self._place = {each: place for place, each in enumerate(order)}

    def given_out(self) -> bool:
        """Give out what is ready, as far as there is room. Whether anybody is at work."""
        while self._next_ready() and self._team.room:
            schedule, stage = self._ready.pop(0)
            try:
                self._give(schedule, stage)
            except RecipeError as error:  # of a stage that is made at once, or that the team cannot make
                self._over(schedule, stage)
                self._refuse(schedule, error)
        return bool(self._at)

    def _give(self, schedule: Schedule, stage: Stage[Session]) -> None:
        schedule.make_room(stage)
        self._told = None  # this may have told of another
        if stage.light:
            schedule.make_light(stage, self._team.session)
            self._over(schedule, stage)
        else:
            self._at[Given(schedule.folder, stage.name)] = stage
            self._team.give(schedule.begun, stage)

    def _over(self, schedule: Schedule, stage: Stage[Session]) -> None:
        self._told = None  # what is taken from other runs now is told of by itself
        self._at.pop(Given(schedule.folder, stage.name), None)
        self._keys.pop(schedule.begun.graph.key(stage.name), None)

    def _refuse(self, schedule: Schedule, error: RecipeError) -> None:
        schedule.refuse(error)
        for each in [each for each in self._ready if each[0] is schedule]:
            self._ready.remove(each)
            self._over(*each)

    def _next_ready(self) -> bool:
        """Look for what has become ready, the first in the graph's order first. Whether anything is."""
        for schedule in self.schedules.values():

            def elsewhere(key: str, schedule: Schedule = schedule) -> bool:
                return self._keys.get(key, schedule) is not schedule

            for stage in schedule.ready(elsewhere):
                self._keys[schedule.begun.graph.key(stage.name)] = schedule
                self._ready.append((schedule, stage))
        self._ready.sort(key=lambda each: self._place[each[0].folder, each[1].name])
        return bool(self._ready)

    def hear(self, event: Event) -> None:
        """Go on from what the team tells."""
        stage, schedule = self._at[event.given], self.schedules[event.given.folder]
        if event.given != self._told:
            self._watcher.begin(stage.title)
            self._told = event.given
        if event.step is not None:
            self._watcher.step(*event.step)
        if event.error is None and event.done is None:
            return
        self._over(schedule, stage)
        if isinstance(event.error, RecipeError):
            # Raised where it is of the disk or the data, and wrong with every stage.
            self._refuse(schedule, event.error)
            self._watcher.end(f"failed: {first_line(event.error)}")
        elif event.error is not None:
            self._watcher.end(f"failed: {first_line(event.error)}")
            self.failed.append(event.error)
        elif event.done is not None:
            schedule.end(event.given.stage, event.done)


def _clear(graph: RunGraph, stage: Stage[Session], state: State) -> None:
    """Take away the stage's stamp, and what stands damaged where its files will be."""
    damaged = [fault.path for fault in graph.faults(state.stamp)] if state.stamp else []
    named = [file for file in stage.files if "*" not in file and (graph.folder / file).is_dir()]
    for path in [stamp_file(graph.folder, stage.name), *(graph.folder / file for file in (*damaged, *named))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
