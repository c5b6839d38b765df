"""Several processes make a run: the same bytes, the same lines, and what happens where one of them is killed or asked to stop."""

import json
import os
import queue
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spunge
from spunge.errors import RecipeError
from spunge.progress import Silent
from spunge.recipe.loading import load_recipe
from spunge.recipe.model import ModelSettings
from spunge.run.executors import lending, processes
from spunge.run.executors.executor import Done, Given
from spunge.run.executors.lending import Lending
from spunge.run.executors.making import Job, Maker, job_of
from spunge.run.executors.processes import Processes, ProcessesSettings, Slot, at_once, slots
from spunge.run.session import Used
from spunge.run.stages.building import build
from started import STEPS_HELD, TWO, Command, content, steps, under_way, until


class Stands(SimpleNamespace):
    """Stands for a process."""

    __hash__ = object.__hash__


class Listener(Silent):
    """A watcher that keeps what it was told, each line with the stage that it is of."""

    def __init__(self) -> None:
        self.title = ""
        self.lines: list[tuple[str, str]] = []

    def begin(self, title: str) -> None:
        self.title = title

    def step(self, done: int, total: int, note: str = "") -> None:
        self.lines.append((self.title, f"{done}/{total} {note.partition(chr(32))[0]}".rstrip()))

    def end(self, outcome: str) -> None:
        self.lines.append((self.title, outcome))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_processes_write_what_this_one_writes_and_say_the_same(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    toy_recipe["unlearn"]["steps"] = 1
    toy_recipe |= {"seeds": processes}
    told = {}
    others = ("execution.kind=processes", f"execution.per_device={processes}")
    for name, overrides in {"here": (), "others": others}.items():
        monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / f"cache-{name}"))
        listener = Listener()
        spunge.run(load_recipe(toy_recipe, overrides), tmp_path / name / "run", listener)
        told[name] = {line for line in listener.lines if line[1] and not line[0].startswith("note")}
    one, other = (content(tmp_path / name / "run") for name in told)
    assert list(one) == list(other)
    for file in one:  # line by line, so that a failure shows the one that differs
        assert one[file].splitlines() == other[file].splitlines(), file
    ended = {line for line in told["here"] if not re.match(r"\d+/\d+( |$)", line[1])}
    assert ended <= told["others"]
    assert ("unlearn control:joint", "2/2 loss") in told["others"]


def test_a_process_refuses_a_stage_whose_rows_changed_since_its_key_was_made(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(toy_recipe["forget"]["source"]).read_text().splitlines()]
    toy_recipe["forget"]["source"] = str(write_rows("mine.jsonl", rows))
    job = job_of(build(load_recipe(toy_recipe), tmp_path / "run"), "branch:asia")
    for changed in (rows[:-1], [row for row in rows if row["topic"] != "asia"]):
        write_rows("mine.jsonl", changed)
        with pytest.raises(RecipeError, match=r"^branch:asia: its rows or files changed while the run was at work"):
            Maker(Listener()).make(job)
    write_rows("mine.jsonl", rows)
    assert isinstance(Maker(Listener()).make(job), Done)


@pytest.mark.parametrize(
    ("execution", "model", "gpus", "visible", "wanted"),
    [
        ({}, {}, 0, None, ["cpu"]),
        ({"per_device": 3}, {"device": "cpu"}, 4, None, ["cpu"] * 3),
        ({}, {}, 2, None, ["0", "1"]),
        ({"per_device": 2}, {"device": "cuda"}, 2, "4,GPU-7", ["4", "GPU-7", "4", "GPU-7"]),
        ({"devices": [1]}, {}, 2, "4,5", ["5"]),
        ({"devices": [0, 2]}, {}, 2, None, "there are 2 GPUs"),
        ({"devices": [1, 1]}, {}, 2, None, "once"),
        ({"devices": []}, {}, 2, None, "there are 2 GPUs"),
        ({"devices": [0]}, {}, 0, None, "model.device is 'cpu'"),
        ({"devices": [0]}, {"device": "cuda:1"}, 2, None, "model.device is 'cuda:1'"),
        ({"per_device": 2}, {"device": "cuda:1"}, 2, None, ["cuda:1"] * 2),
    ],
)
def test_each_process_sees_one_device_and_what_is_not_there_is_refused(
    execution: dict[str, Any],
    model: dict[str, Any],
    gpus: int,
    visible: str | None,
    wanted: list[str] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("spunge.run.executors.processes.processors", lambda: 8)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings, of = ProcessesSettings(**execution), ModelSettings(path="x", **model)
    if isinstance(wanted, str):
        with pytest.raises(RecipeError, match=rf"^execution.devices: .*{wanted}"):
            slots(settings, of)
        return
    there = slots(settings, of)
    assert [slot.environment.get("CUDA_VISIBLE_DEVICES", slot.told) for slot in there] == wanted
    assert {slot.environment["OMP_NUM_THREADS"] for slot in there} == {str(8 // len(wanted))}
    assert at_once(settings, of) == len(wanted)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert all("OMP_NUM_THREADS" not in slot.environment for slot in slots(settings, of))


def test_where_a_run_is_made_is_no_part_of_it(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = [build(load_recipe(toy_recipe, overrides), tmp_path / "run") for overrides in ((), TWO)]
    keys = [
        {name: run.graph.key(name) for name in ("recipe", "branch:asia", "judge:base/75f0ef4362a8")} for run in runs
    ]
    assert keys[0] == keys[1]


def test_a_process_that_ends_as_it_begins_while_all_are_stopped_hides_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    given, heard = Given(Path(), "branch:asia"), queue.SimpleQueue[Any]()
    slot = SimpleNamespace(told="cpu")
    begins, works = (Stands(given=given, ready=ready, slot=slot, send=lambda stop: None) for ready in (False, True))
    done = Done({}, "", 1.0, Used(None, None, 0))
    for told in ((begins, None), (works, done)):
        heard.put(told)
    team = object.__new__(Processes)
    monkeypatch.setattr(team, "_heard", heard, raising=False)
    monkeypatch.setattr(team, "_processes", [begins, works], raising=False)
    monkeypatch.setattr(team, "_lending", Lending(), raising=False)
    monkeypatch.setattr(team, "_jobs", {}, raising=False)
    assert [event.done for event in team.wound_down()] == [done]


@pytest.mark.parametrize("waits", [True, False])
def test_who_stands_still_at_a_batch_of_anothers_stage_is_ended_and_its_own_stage_made_by_a_new_process(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    judged, own = Given(Path(), "judge:base/1"), Given(Path(), "branch:asia")
    slot, heard, ended = Slot("cpu", {}), queue.SimpleQueue[Any](), []

    class Stub(Stands):
        def __init__(self, slot: Slot, heard: Any) -> None:
            super().__init__(slot=slot, given=None, title="", needs=(), sent=[])

        def send(self, message: Any) -> None:
            self.sent.append(message)

        def end(self) -> None:
            ended.append(self)

    monkeypatch.setattr(processes, "Process", Stub)
    monkeypatch.setattr(lending, "LENT_AFTER", -1.0)
    job = Job(Path(), {}, False, "branch:asia", {}, None, None)
    lends, still, team = Lending[Any](), Stub(slot, heard), object.__new__(Processes)
    told = {"_lending": lends, "_processes": [still], "_slots": [slot], "_heard": heard, "_jobs": {}}
    for name, value in told.items():
        setattr(team, name, value)
    lends.begin(judged, job._replace(stage="judge:base/1"), "judge", ())
    lends.lend(still, judged)
    number = still.sent[0].number
    lends.end(judged)
    if waits:
        still.given, still.title, team._jobs[still] = own, "unlearn asia", job
    team._meanwhile()
    assert not ended  # it may still be at its last batch
    monkeypatch.setattr(lending, "LEAVES_WITHIN", -1.0)
    team._meanwhile()
    assert ended == [still]
    assert [(each.given, each.sent) for each in team._processes] == ([(own, [job])] if waits else [])
    lends.begin(judged, job, "judge", ())
    lends.lend(still, judged)
    lends.leave(still)
    lends.left(still, number)  # of an earlier request
    assert lends.leaves(still)
    lends.left(still, still.sent[-1].number)
    assert not lends.leaves(still)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_gone_costs_its_branch_alone_and_the_next_command_goes_on(
    long: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    recipe, undisturbed = long
    command = under_way(recipe, tmp_path / "run", *TWO, held=tmp_path / "held")
    os.kill(command.children()[0], number)
    (tmp_path / "held").unlink()
    code, errors = command.ended()
    assert code == 1
    last = errors.splitlines()[-1]
    assert re.match(r"spunge: unlearn branch:(asia|europe): its process on cpu (was|ended)", last), last
    assert last.endswith("the same command goes on from what is finished")
    assert "Traceback" not in errors
    stamps = [each.stem for each in (tmp_path / "run" / "stamps" / "branch").glob("*.json")]
    assert len(stamps) == 1
    assert list((tmp_path / "run" / "stamps" / "judge" / "branch" / stamps[0]).glob("*.json"))
    assert Command(recipe, tmp_path / "run", *TWO).ended()[0] == 0
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_process_and_the_next_one_goes_on_at_once(
    long: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    recipe, undisturbed = long
    command = under_way(recipe, tmp_path / "run", *TWO, held=tmp_path / "held")
    children = command.children()
    assert len(children) == 2
    # A terminal signals the whole group; a kill is of the one process.
    (os.kill if number == signal.SIGKILL else os.killpg)(command.process.pid, number)
    code, errors = command.ended()
    done = {branch: steps(tmp_path / "run", branch) for branch in ("asia", "europe")}
    again = Command(recipe, tmp_path / "run")
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + number
        assert errors.splitlines()[-1].startswith("spunge: stopped; ")
        for branch, count in done.items():
            assert list((tmp_path / "run" / "branches" / branch).glob("state-*.pt")), branch
            assert 3 < count <= STEPS_HELD
    assert again.ended()[0] == 0
    assert content(tmp_path / "run") == content(undisturbed)


@pytest.mark.thorough
def test_an_error_of_a_process_is_the_line_that_it_would_be_here(long: tuple[Path, Path], tmp_path: Path) -> None:
    said = []
    for name, overrides in {"here": (), "two": TWO}.items():
        code, errors = Command(long[0], tmp_path / name, *overrides, "unlearn.learning_rate=1e-30").ended()
        said.append((code, errors.splitlines()[-1]))
    assert said[0][0] == 2
    assert "is lost in rounding" in said[0][1]
    assert re.sub("asia|europe", "", said[0][1]) == re.sub("asia|europe", "", said[1][1])
