"""Progress: a bar in a terminal, plain lines elsewhere; names are shown as they are."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from spunge import progress
from spunge.evaluation.attacks.target import share_of
from spunge.progress import Terminal

ODD = "unlearn branch::a: [red]x[/red]"


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """What stands for stderr."""
    console = Console(file=io.StringIO(), force_terminal=request.param, width=60, highlight=False)
    monkeypatch.setattr(progress, "ERRORS", console)
    return console


def shown(console: Console) -> str:
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return Text.from_ansi(stream.getvalue()).plain


def test_a_stage_and_its_outcome_are_shown_as_they_are_written(screen: Console) -> None:
    watcher = Terminal()
    watcher.begin(ODD)
    watcher.step(1, 2, "loss :b:")
    watcher.end("done [b]:smile:[/b]")
    last = shown(screen).splitlines()[-1]
    assert f"{ODD}: done [b]:smile:[/b]" in last
    if screen.is_terminal:
        assert "loss :b:" in shown(screen)
        assert "1/2" in shown(screen)


def test_a_stage_of_which_there_is_nothing_to_say_ends_with_its_name(screen: Console) -> None:
    watcher = Terminal()
    watcher.begin(ODD)
    watcher.end("")
    assert shown(screen).splitlines()[-1].endswith(f"s  {ODD}")


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """So much goes by between two looks at the clock."""
    clock = iter(float(second) for second in range(0, 1000, seconds))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))


def test_without_a_terminal_a_long_stage_says_how_far_it_is_every_now_and_then(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 5)
    watcher = Terminal()
    watcher.begin("judge")
    for number in range(1, 13):
        watcher.step(number, 12, f"item {number}")
    watcher.end("12 items")
    lines = [line for line in shown(screen).splitlines() if "s  judge: " in line]
    counted = [line.split("judge: ")[1] for line in lines]
    if screen.is_terminal:
        assert counted == ["12 items"]
    else:
        assert counted[-1] == "12 items"
        assert 1 <= len(counted[:-1]) <= 3
        assert counted[0] == "6/12 item 6"


def test_stages_that_are_under_way_at_once_are_each_told_by_their_own_name_and_time(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 10)
    watcher = Terminal()
    for title, step in (("a", 1), ("b", 7), ("a", 2)):
        watcher.begin(title)
        watcher.step(step, 9, f"{title} at {step}")
    watcher.end("a is done")
    watcher.begin("b")
    watcher.end("b is done")
    lines = [line for line in shown(screen).splitlines() if " is done" in line]
    assert [line.split("  ")[-1] for line in lines] == ["a: a is done", "b: b is done"]
    seconds = [float(line.split()[0]) for line in lines]
    assert seconds[0] > 0
    if screen.is_terminal:
        assert "b at 7" in shown(screen)


def test_a_line_of_progress_is_not_longer_than_any_other_message(screen: Console) -> None:
    watcher = Terminal()
    watcher.begin("read")
    watcher.end(", ".join(f"part {number}: 12" for number in range(1000)))
    assert len(shown(screen).splitlines()[-1]) < 340


def test_rounds_count_as_one_piece_of_work() -> None:
    heard: list[tuple[int, int, str]] = []
    for index in range(2):
        step = share_of(lambda done, total, note="": heard.append((done, total, note)), index, 2)
        step(1, 4)
        step(4, 4, "end")
    assert heard == [(1, 8, ""), (4, 8, "end"), (5, 8, ""), (8, 8, "end")]
