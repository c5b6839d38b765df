"""Processes that have nothing to make take batches of the judging that others are at."""

import signal
from pathlib import Path
from typing import Any

import pytest

import spunge
from lent import judged
from spunge.recipe.loading import load_recipe
from spunge.run.executors import lending
from spunge.run.executors.channel import Help, Leave
from spunge.run.executors.executor import Given
from spunge.run.executors.lending import Lending
from spunge.run.executors.making import Job
from started import content, forked

TOKENS = 200  # long enough for more batches than one to be another process's
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


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[dict[str, Any], Path]:
    """A recipe with an evaluation that is long enough to be shared, and the folder of its run by this process."""
    folder = tmp_path_factory.mktemp("lasting")
    retain = request.getfixturevalue("_toy_rows")["retain"]
    rows = {"source": str(retain), "by": "NULL", "limit": 24}
    written = {
        "kind": "match",
        "subject": "written",
        "prompt": "text",
        "unwanted": "text",
        "generation": {"max_new_tokens": TOKENS, "temperature": 1.0, "samples": 12},
    }
    recipe = {
        "model": {"path": str(request.getfixturevalue("tiny")("llama")), "dtype": "float32"},
        "judge": [],
        "evaluate": [{**written, **rows}, {"kind": "perplexity", "subject": "read", **rows}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUNGE_CACHE", str(folder / "cache"))
        spunge.run(load_recipe(recipe), folder / "here" / "run")
    return recipe, folder / "here" / "run"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("who", "number"),
    [(None, 0), ("helper", signal.SIGKILL), ("helper", signal.SIGSTOP), ("maker", signal.SIGKILL)],
)
def test_one_long_evaluation_by_two_processes_leaves_the_files_of_one(
    lasting: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: str | None,
    number: int,
) -> None:
    recipe, here = lasting
    monkeypatch.setenv("SPUNGE_CACHE", str(tmp_path / "cache"))
    batches, errors, boards = forked(judged, recipe, tmp_path / "two" / "run", who, number, spares=4)
    assert batches > 1
    assert boards == 0
    assert len(errors) == (who == "maker")
    assert all("was killed" in error for error in errors)
    assert content(tmp_path / "two" / "run") == content(here)
