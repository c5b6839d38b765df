"""Which stage is made when: whoever makes them, in whatever order they end, the folder is the same."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spunge.errors import LostError, RecipeError
from spunge.files import write_text
from spunge.progress import SILENT, Silent
from spunge.run.executors.executor import Event, Given
from spunge.run.executors.making import made
from spunge.run.graph import Graph, Made, Stage
from spunge.run.schedule import Schedule, make_all
from spunge.run.session import Used
from spunge.run.stages.building import Run

ELSEWHERE = Used("cuda", "bfloat16", 1 << 60)


class Team:
    """Makes what it was given in an order of its own. fails: stage -> the error that it ends with."""

    def __init__(self, size: int, seed: int = 0, **fails: Exception) -> None:
        self.size = size
        self.fails = fails
        self.session: Any = SimpleNamespace(used=ELSEWHERE, used_elsewhere=lambda stages: None)
        self.ended: list[str] = []
        self.most = 0
        self._given: list[tuple[Graph[Any], Stage[Any]]] = []
        self._random = random.Random(seed)

    @property
    def room(self) -> bool:
        return len(self._given) < self.size

    def give(self, begun: Any, stage: Stage[Any]) -> None:
        for need in (*stage.needs, *stage.after):
            assert begun.graph.state(need).done, f"{stage.name} was given before {need} was done"
        self._given.append((begun.graph, stage))
        self.most = max(self.most, len(self._given))

    def told(self) -> Event:
        graph, stage = self._given.pop(self._random.randrange(len(self._given)))
        self.ended.append(stage.name)
        given = Given(graph.folder, stage.name)
        if stage.name in self.fails:
            return Event(given, error=self.fails[stage.name])
        return Event(given, done=made(graph, stage, SimpleNamespace(used=ELSEWHERE)))  # type: ignore[arg-type]

    def wound_down(self) -> Iterator[Event]:
        while self._given:
            yield self.told()


def stage(graph: Graph[Any], name: str, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Stage[Any]:
    """It writes what it needs into NAME.txt."""
    file = graph.folder / f"{name}.txt"

    def make(session: Any) -> Made:
        write_text(file, " ".join((graph.folder / f"{need}.txt").read_text() for need in needs) + name)
        return Made([file])

    return Stage(name, name, needs=needs, after=after, inputs=lambda: {"name": name}, files=(file.name,), make=make)


def scheduled(graph: Graph[Any], watcher: Any = SILENT, **more: Any) -> Schedule:
    base, recipe = SimpleNamespace(untaught=graph.folder), SimpleNamespace(keep_texts="all", unlearn=None)
    return Schedule(Run(recipe, graph, base, [], [], True), watcher, **more)  # type: ignore[arg-type]


def drawn(folder: Path, seed: int) -> Graph[Any]:
    """Twelve stages, each of which needs some of those before it."""
    folder.mkdir()
    graph: Graph[Any] = Graph(folder)
    chance = random.Random(seed)
    for number in range(12):
        before = [f"s{each}" for each in range(number)]
        needs = tuple(each for each in before if chance.random() < 0.2)
        after = tuple(each for each in before if chance.random() < 0.1)
        graph.add(stage(graph, f"s{number}", needs, after))
    return graph


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.txt")}


def test_a_stage_is_made_once_what_it_needs_is_done_and_the_files_are_the_same_in_any_order(tmp_path: Path) -> None:
    most = 0
    for seed in range(8):
        graphs = [drawn(tmp_path / f"{seed}-{size}", seed) for size in (1, 2, 5)]
        teams = [Team(1), Team(2, seed), Team(5, seed)]
        for graph, team in zip(graphs, teams, strict=True):
            make_all([scheduled(graph)], team, SILENT)
            assert sorted(team.ended) == sorted(graph.stages)
            assert team.most <= team.size
        assert teams[0].ended == list(graphs[0].stages)  # one after the other, as the graph has them
        assert content(graphs[0].folder) == content(graphs[1].folder) == content(graphs[2].folder)
        most = max(most, teams[2].most)
    assert most == 5


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, title: str) -> None:
        self.lines.append(title)

    def step(self, done: int, total: int, note: str = "", /) -> None:
        self.lines.append(f"{done}/{total}")

    def end(self, outcome: str) -> None:
        self.lines.append("end")


def test_a_stage_begins_when_its_work_does_and_not_when_it_is_given_out(tmp_path: Path) -> None:
    """What waits for a process to start is no part of a stage's time."""
    graph, heard = Graph[Any](tmp_path), Lines()
    for name in ("a", "b"):
        graph.add(stage(graph, name))

    class Slow(Team):
        def told(self) -> Event:
            if not heard.lines:
                assert len(self._given) == 2
                return Event(Given(tmp_path, "b"))
            if heard.lines == ["b"]:
                return Event(Given(tmp_path, "a"))
            if heard.lines == ["b", "a"]:
                return Event(Given(tmp_path, "b"), step=(1, 2, ""))
            return super().told()

    make_all([scheduled(graph, watcher=heard)], Slow(2), heard)
    assert heard.lines[:4] == ["b", "a", "b", "1/2"]
    assert sorted(heard.lines[4:]) in (["a", "end", "end"], ["a", "b", "end", "end"])


def test_what_is_done_already_is_not_given_out(tmp_path: Path) -> None:
    make_all([scheduled(drawn(tmp_path / "run", 1))], Team(2), SILENT)
    again = Graph[Any](tmp_path / "run")
    for each in drawn(tmp_path / "other", 1).stages.values():
        again.add(stage(again, each.name, each.needs, each.after))
    (tmp_path / "run" / "s3.txt").unlink()
    team = Team(2)
    make_all([scheduled(again)], team, SILENT)
    assert team.ended == ["s3"]


def fork(folder: Path, run: str = "") -> Graph[Any]:
    """base -> left -> leaf and base -> right; all of them -> end. run: its stages are of this run alone."""
    graph: Graph[Any] = Graph(folder)
    mark = f"{run}-" if run else ""
    for name, needs in (("base", ()), ("left", ("base",)), ("right", ("base",)), ("leaf", ("left",))):
        graph.add(stage(graph, mark + name, tuple(mark + need for need in needs)))
    graph.add(stage(graph, f"{mark}end", (f"{mark}leaf", f"{mark}right")))
    return graph


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stage_that_is_lost_keeps_back_only_what_needs_it_and_is_told_at_the_end(tmp_path: Path, size: int) -> None:
    graph, team = fork(tmp_path), Team(size, left=LostError("left: killed"))
    with pytest.raises(LostError, match="left: killed"):
        make_all([scheduled(graph)], team, SILENT)
    assert sorted(team.ended) == ["base", "left", "right"]
    assert [name for name in graph.stages if graph.state(name).done] == ["base", "right"]
    again = Team(size)
    make_all([scheduled(fork(tmp_path))], again, SILENT)
    assert again.ended == ["left", "leaf", "end"]


def test_what_is_wrong_with_the_recipe_ends_all_and_what_was_under_way_is_kept(tmp_path: Path) -> None:
    graph, team = fork(tmp_path), Team(2, seed=3, left=RecipeError("unlearn: wrong"))
    with pytest.raises(RecipeError, match="unlearn: wrong"):
        make_all([scheduled(graph)], team, SILENT)
    assert "end" not in team.ended
    assert graph.state("right").done


def test_several_runs_are_made_by_one_team(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    graphs, team = [fork(tmp_path / name, name) for name in ("a", "b")], Team(4)
    make_all([scheduled(graph) for graph in graphs], team, SILENT)
    assert len(team.ended) == 10
    assert team.most >= 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_two_runs_make_alike_is_made_once_also_where_both_are_ready_at_once(tmp_path: Path, size: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    team = Team(size)
    make_all([scheduled(fork(folder), others=folders) for folder in folders], team, SILENT)
    assert sorted(team.ended) == ["base", "end", "leaf", "left", "right"]
    assert content(folders[0]) == content(folders[1])


class Heard(Silent):
    """What stages end with."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def end(self, outcome: str) -> None:
        self.ended.append(outcome)


def test_what_is_wrong_with_one_run_alone_ends_it_and_the_others_go_on(tmp_path: Path) -> None:
    graphs = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        graphs[name] = fork(tmp_path / name, name)
    error = RecipeError("unlearn.learning_rate: 9: too high")
    team = Team(3, **{"a-left": error})
    schedules = [scheduled(graph, own=lambda told: str(told).startswith("unlearn.")) for graph in graphs.values()]
    heard = Heard()
    make_all(schedules, team, heard)
    assert heard.ended == ["failed: unlearn.learning_rate: 9: too high"]  # no display goes on to show it
    assert [schedule.refused for schedule in schedules] == [error, None]
    assert {name for name in graphs["a"].stages if graphs["a"].state(name).done} == {"a-base", "a-right"}
    assert all(graphs["b"].state(name).done for name in graphs["b"].stages)
    with pytest.raises(RecipeError, match=r"^unlearn.learning_rate: 9"):
        make_all([scheduled(fork(tmp_path / "a", "a"), own=lambda told: False)], team, SILENT)
