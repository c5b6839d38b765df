"""Progress: a bar in a terminal, plain lines elsewhere; names are shown as they are."""

import io
import math
import re
import time

import pytest
from rich.console import Console
from rich.text import Text

from spunge import progress
from spunge.evaluation.attacks.target import share_of
from spunge.progress import Board, Expected, Terminal

ODD = "unlearn branch::a: [red]x[/red]"


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """What stands for stderr."""
    console = Console(file=io.StringIO(), force_terminal=request.param, width=100, highlight=False)
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
    now = shown_now(watcher, screen)
    watcher.end("done [b]:smile:[/b]")
    last = shown(screen).splitlines()[-1]
    assert f"{ODD}: done [b]:smile:[/b]" in last
    if screen.is_terminal:
        assert "loss :b:" in now
        assert "1/2" in now


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
        assert counted[0].startswith("6/12 item 6, ")


def test_without_a_terminal_a_stage_that_counts_nothing_is_told_of_too(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    watcher = Terminal()
    watcher.begin("merge")
    deadline = time.monotonic() + 10
    while not screen.is_terminal and "merge: at work" not in shown(screen) and time.monotonic() < deadline:
        time.sleep(0.01)
    watcher.close()
    assert ("merge: at work" in shown(screen)) is not screen.is_terminal


def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: what its list holds."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    return clock


def test_what_is_left_of_the_run_is_what_such_work_took_until_now(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = at(monkeypatch)
    watcher = Terminal()
    watcher.expect([Expected("a", "model", 10.0), Expected("b", "model", 30.0), Expected("c", "model", 20.0)])
    watcher.begin("a")
    clock[0] = 100.0
    watcher.end("")
    watcher.begin("b")
    for seconds, step in ((100.0, 0), (250.0, 5)):  # half of it: 10 seconds for each unit of work
        clock[0] = seconds
        watcher.step(step, 10, "loss 1")
    told = shown_now(watcher, screen)
    assert "2:30 left" in told
    assert (
        re.search(r"the run .*1/3 +stages +5:50 left", told) if screen.is_terminal else "5:50 of the run left" in told
    )
    watcher.close()


def test_stages_at_once_share_what_is_left() -> None:
    board = Board()
    board.expect([Expected(name, "model", 10.0) for name in "abcd"])
    board.begin("a", 0.0)
    board.begin("b", 0.0)
    for title in "ab":
        board.step(title, 0.0, 0, 10, "")
        board.step(title, 50.0, 5, 10, "")
    assert board.left(50.0) == pytest.approx((50 + 50 + 100 + 100) / 2)


def test_nothing_is_said_of_the_rest_of_a_run_while_some_stages_work_is_not_known() -> None:
    board = Board()
    board.expect([Expected("a", "disk", math.inf), Expected("b", "disk", math.inf), Expected("c", "disk", math.inf)])
    for title, now in (("a", 0.0), ("b", 3.0)):
        board.begin(title, now)
        board.step(title, now + 1, 1, 4, "")
        board.step(title, now + 2, 2, 4, "")
        assert board.left(now + 2) is None
        board.end(title, now + 3)
    board.begin("c", 6.0)
    assert board.left(7.0) is None


def test_nothing_is_said_of_the_rest_of_a_run_while_no_work_of_its_kind_was_seen() -> None:
    board = Board()
    board.expect([Expected("a", "model", 10.0), Expected("b", "disk", 5.0)])
    board.begin("a", 0.0)
    board.step("a", 0.0, 0, 4, "")
    board.step("a", 8.0, 2, 4, "")
    assert board.left(8.0) is None
    assert board.under_way["a"].left(8.0) == 8.0


def test_a_training_that_goes_on_is_judged_by_its_own_steps_alone() -> None:
    board = Board()
    board.begin("a", 0.0)
    board.step("a", 100.0, 80, 100, "")
    board.step("a", 110.0, 90, 100, "")
    assert board.under_way["a"].left(110.0) == 10.0


def shown_now(watcher: Terminal, console: Console) -> str:
    """What a person sees: in a terminal the display as it is now."""
    if not console.is_terminal:
        return shown(console)
    with console.capture() as caught:
        console.print(watcher.display())
    return Text.from_ansi(caught.get()).plain


def test_the_display_shows_every_stage_under_way_the_next_ones_and_how_many_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "ERRORS", console)
    watcher = Terminal()
    watcher.expect([Expected(f"judge {number} [b]\x1b[31m", "model", 1.0) for number in range(9)])
    for number in (0, 1):
        watcher.begin(f"judge {number} [b]\x1b[31m")
        watcher.step(1, 4, f"loss {number} [b]\x07")
    lines = shown_now(watcher, console).splitlines()
    watcher.close()
    assert [line.split()[1] for line in lines[:6]] == list("012345")
    assert "1/4" in lines[1]
    assert "loss 1 [b]" in lines[1]
    assert lines[6].split() == ["and", "3", "more"]
    assert "0/9" in lines[7]
    assert "\x07" not in "".join(lines)


def test_stages_that_are_under_way_at_once_are_each_told_by_their_own_name_and_time(
    screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 10)
    watcher = Terminal()
    for title, step in (("a", 1), ("b", 7), ("a", 2)):
        watcher.begin(title)
        watcher.step(step, 9, f"{title} at {step}")
    now = shown_now(watcher, screen)
    watcher.end("a is done")
    watcher.begin("b")
    watcher.end("b is done")
    lines = [line for line in shown(screen).splitlines() if " is done" in line]
    assert [line.split("  ")[-1] for line in lines] == ["a: a is done", "b: b is done"]
    seconds = [float(line.split()[0]) for line in lines]
    assert seconds[0] > 0
    if screen.is_terminal:
        assert "b at 7" in now


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
