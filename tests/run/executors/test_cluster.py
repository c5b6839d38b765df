"""A Ray cluster of several nodes on this machine makes a run: the same bytes, whatever is killed meanwhile."""

import builtins
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spunge.errors import RecipeError
from spunge.recipe.model import ModelSettings
from spunge.run.executors import cluster as executor
from spunge.run.executors.cluster import at_once
from spunge.run.executors.executor import Done, Event, Given
from spunge.run.executors.node import Seen
from spunge.run.executors.nodes import RaySettings, needed, places
from spunge.run.session import Used
from started import Command, content, kept, steps, under_way

STEPS = 60


def test_where_ray_is_not_installed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = builtins.__import__

    def imported(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return installed(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(RecipeError, match=r"^execution.kind: ray: needs Ray; pip install 'spunge\[ray\]'$"):
        at_once(RaySettings(), ModelSettings(path="x"))


@pytest.mark.parametrize(
    ("settings", "device", "nodes", "needs", "count"),
    [
        ({}, "auto", [{"CPU": 8.0}, {"CPU": 4.0}], {"CPU": 1.0}, 12),
        ({}, "auto", [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}], {"GPU": 1.0}, 2),
        ({}, "cpu", [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}], {"CPU": 1.0}, 12),
        ({"resources": {"gpu": 2, "cpu": 4}}, "auto", [{"CPU": 8.0, "GPU": 8.0}], {"GPU": 2.0, "CPU": 4.0}, 2),
        ({"resources": {"gpu": 0.5}}, "auto", [{"CPU": 8.0, "GPU": 1.0}], {"GPU": 0.5}, 2),
        ({"resources": {"big": 1}}, "auto", [{"CPU": 8.0}, {"CPU": 8.0, "big": 3.0}], {"big": 1.0}, 3),
    ],
)
def test_as_many_stages_are_made_at_once_as_the_nodes_have_what_one_takes(
    settings: dict[str, Any], device: str, nodes: list[Mapping[str, float]], needs: dict[str, float], count: int
) -> None:
    takes = needed(RaySettings(**settings), ModelSettings(path="x", device=device), nodes)
    assert takes == needs
    assert places(takes, nodes) == count


def test_a_node_that_does_not_see_the_folder_or_has_another_version_refuses(tmp_path: Path) -> None:
    from spunge import __version__

    seen = Seen(tmp_path / "seen", "token", __version__)
    with pytest.raises(RecipeError, match=r"^--out: a node does not see '.*'; give a folder that all nodes share"):
        seen.refuse()
    seen.file.write_text("of another run")
    with pytest.raises(RecipeError, match=r"^--out: a node does not see"):
        seen.refuse()
    seen.file.write_text("token")
    seen.refuse()
    with pytest.raises(RecipeError, match=rf"a node has spunge {__version__}, and this one 9; install the same on all"):
        seen._replace(version="9").refuse()


@pytest.mark.parametrize(("heard", "seconds", "moved"), [(False, 60.0, True), (False, 0.0, False), (True, 60.0, False)])
def test_what_waits_for_a_node_that_went_is_made_by_an_actor_that_is_free(
    monkeypatch: pytest.MonkeyPatch, heard: bool, seconds: float, moved: bool
) -> None:
    """A node that went was still counted: for an actor that was started then there is no room but what the free one holds."""
    team, given, ended = object.__new__(executor.Cluster), [], []
    monkeypatch.setattr(team, "_assign", given.append, raising=False)
    monkeypatch.setattr(team, "_end", ended.append, raising=False)
    waits = executor._Actor("waits", time.monotonic() - seconds, task="stage", heard=heard)  # type: ignore[arg-type]
    free = executor._Actor("free", time.monotonic())
    monkeypatch.setattr(team, "_actors", [waits, free], raising=False)
    team._hand_over()
    assert (ended, given) == (([waits], ["stage"]) if moved else ([], []))
    monkeypatch.setattr(team, "_actors", [waits], raising=False)
    team._hand_over()
    assert len(ended) == moved  # with none that is free it goes on waiting


def test_what_is_finished_when_a_stop_is_asked_for_is_told_and_not_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One end was heard and not told yet; another has come while its actor was asked to stop, which nothing there looks for."""
    heard, made, lost = (
        Event(Given(tmp_path, name), done=Done({}, name, 1.0, Used(None, None, 0)))
        for name in ("heard", "made", "lost")
    )
    results, killed = {"made": made.done}, []

    def wait(references: list[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        return [each for each in references if each in results], []

    class RayError(Exception): ...

    ray = SimpleNamespace(
        get=lambda reference, timeout=None: results.get(reference, False),
        wait=wait,
        kill=lambda handle, no_restart: killed.append(handle),
        exceptions=SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    handle = SimpleNamespace(stop=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=object)))
    team = object.__new__(executor.Cluster)
    tasks = [SimpleNamespace(given=event.given) for event in (made, lost)]
    actors = [
        executor._Actor(handle, 0.0, task=task, result=event.given.stage, heard=True)  # type: ignore[arg-type]
        for task, event in zip(tasks, (made, lost), strict=True)
    ]
    step = Event(heard.given, step=(1, 2, ""))
    values = {"_events": deque([step, heard]), "_again": [], "_actors": list(actors), "_courier": None}
    for name, value in values.items():
        monkeypatch.setattr(team, name, value, raising=False)
    assert list(team.wound_down()) == [heard, made]
    assert len(killed) == 1
    assert team._actors == [actors[0]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes of one CPU each; the first, which the command connects to, has none."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    made.others = [made.add_node(num_cpus=1, **small) for _ in range(2)]
    yield made
    made.shutdown()


def executed(cluster: Any) -> list[str]:
    return ["execution.kind=ray", f"execution.address={cluster.address}"]


@pytest.mark.thorough
def test_a_run_is_the_same_where_a_node_is_killed_in_a_branch(
    cluster: Any,
    long: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    recipe, undisturbed = long
    command = under_way(recipe, tmp_path / "run", *executed(cluster), within=500)
    cluster.remove_node(cluster.others[0], allow_graceful=False)
    code, errors = command.ended(900)
    assert code == 0, errors
    assert "its node or process is gone" in errors
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.thorough
def test_a_command_that_is_killed_goes_on_where_it_was(
    cluster: Any,
    long: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    recipe, undisturbed = long
    command = under_way(recipe, tmp_path / "run", *executed(cluster), within=500)
    os.kill(command.process.pid, signal.SIGKILL)
    command.ended()
    again = Command(recipe, tmp_path / "run", *executed(cluster))
    code, errors = again.ended(900)
    assert code == 0, errors
    assert content(tmp_path / "run") == content(undisturbed)
    for branch in ("asia", "europe"):
        numbers = [
            json.loads(line)["step"]
            for line in (tmp_path / "run/branches" / branch / "log.jsonl").read_text().splitlines()
        ]
        assert numbers == list(range(1, STEPS + 1))
    assert steps(tmp_path / "run", "asia") == STEPS


@pytest.mark.thorough
def test_a_command_that_is_asked_to_stop_leaves_the_states_of_its_branches(
    cluster: Any,
    long: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    command = under_way(long[0], tmp_path / "run", *executed(cluster), within=500)
    started = time.monotonic()
    os.kill(command.process.pid, signal.SIGTERM)
    code, errors = command.ended(300)
    assert code == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1].startswith("spunge: stopped; ")
    assert time.monotonic() - started < 200
    assert kept(tmp_path / "run") == {"asia", "europe"}
