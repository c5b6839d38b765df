"""Processes that have nothing to make take batches of the judging that others are at."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import spunge
from spunge.errors import LostError
from spunge.recipe.loading import load_recipe
from spunge.run.executors import lending
from spunge.run.executors.channel import Help, Leave
from spunge.run.executors.executor import Given
from spunge.run.executors.lending import Lending
from spunge.run.executors.making import Job
from spunge.run.executors.processes import Process
from started import content, until

TWO = ("execution.kind=processes", "execution.per_device=2")
GIVEN, OTHER = Given(Path("run"), "judge:base/1"), Given(Path("run"), "judge:base/2")
JOB = Job(Path("run"), {}, False, "judge:base/1", {}, None, None)


class Hears:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def send(self, message: Any) -> None:
        self.heard.append(message)


@pytest.fixture
def lends(monkeypatch: pytest.MonkeyPatch) -> Lending[Hears]:
    monkeypatch.setattr(lending, "LENT_AFTER", -1.0)
    return Lending()


def test_help_goes_to_the_stage_that_has_the_least_and_ends_with_it(lends: Lending[Hears]) -> None:
    one, two, three = Hears(), Hears(), Hears()
    for given in (GIVEN, OTHER):
        assert lends.begin(given, JOB, "judge", ("base",)).board is not None
    for process in (one, two, three):
        wanting = lends.wanting()
        assert wanting is not None
        assert lends.lend(process, wanting) == ("base",)
    assert [each.heard[0].job.board for each in (one, two, three)].count(one.heard[0].job.board) == 2
    lends.leave(two)
    lends.end(GIVEN)
    lends.end(OTHER)
    for process in (one, two, three):
        asked, told = process.heard
        assert isinstance(asked, Help)
        assert told == Leave(asked.number)
        assert not lends.helps(process)
    assert lends.wanting() is None


def test_a_stage_is_not_helped_before_it_lasts_nor_after_one_who_helped_is_gone(
    lends: Lending[Hears], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = Hears()
    lends.begin(GIVEN, JOB, "judge base: written", ("base",))
    monkeypatch.setattr(lending, "LENT_AFTER", 3600.0)
    assert lends.wanting() is None
    monkeypatch.setattr(lending, "LENT_AFTER", -1.0)
    lends.lend(process, GIVEN)
    lends.lost(Hears(), "it ended")
    assert lends.wanting() == GIVEN
    assert not caplog.records
    lends.lost(process, "it ended")
    assert lends.wanting() is None
    [record] = caplog.records
    assert record.getMessage() == (
        "judge base: written: a process that took some of its batches does so no more (it ended); it goes on without"
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("who", "number"),
    [(None, 0), ("helper", signal.SIGKILL), ("helper", signal.SIGSTOP), ("maker", signal.SIGKILL)],
)
def test_one_long_evaluation_by_two_processes_leaves_the_files_of_one(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str | None, number: int
) -> None:
    written = {"max_new_tokens": 300, "temperature": 1.0, "samples": 12}
    rows = {"source": toy_recipe["retain"]["source"], "by": "NULL", "limit": 24}
    recipe = {
        "model": toy_recipe["model"],
        "judge": [],
        "evaluate": [
            {
                "kind": "match",
                "subject": "written",
                "prompt": "text",
                "unwanted": "text",
                "generation": written,
                **rows,
            },
            {"kind": "perplexity", "subject": "read", **rows},
        ],
    }
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache-here"))
    spunge.run(load_recipe(recipe), tmp_path / "here" / "run")
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache-two"))
    monkeypatch.setattr(lending, "LENT_AFTER", 0.0)
    boards: list[Path] = []
    lend, begin, give = Lending.lend, Lending.begin, Process.send
    team: dict[str, Process] = {}

    def lent(self: Any, process: Process, given: Given) -> Any:
        team["helper"] = process
        return lend(self, process, given)

    def begun(self: Any, *given: Any) -> Any:
        job = begin(self, *given)
        boards.append(job.board)
        return job

    def sent(self: Process, message: Any) -> None:
        if isinstance(message, Job):
            team["maker"] = self
        give(self, message)

    monkeypatch.setattr(Lending, "lend", lent)
    monkeypatch.setattr(Lending, "begin", begun)
    monkeypatch.setattr(Process, "send", sent)
    left: set[Path] = set()

    def watch() -> None:
        def some() -> bool:
            for board in boards:
                left.update(file for file in board.glob("*.result") if file.exists() and file.stat().st_size)
            return len(left) > 1

        until(some)
        if who:
            os.kill(team[who]._process.pid, number)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    if who == "maker":
        with pytest.raises(LostError, match="was killed"):
            spunge.run(load_recipe(recipe, TWO), tmp_path / "two" / "run")
    spunge.run(load_recipe(recipe, TWO), tmp_path / "two" / "run")
    watching.join(1.0)
    assert len(left) > 1
    assert content(tmp_path / "two" / "run") == content(tmp_path / "here" / "run")
    assert not any(board.exists() for board in boards)
