"""How the command ends: its exit code and the one line that says why. What takes a process of its own is in test_process.py."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import pytest
import typer
from typer.models import CommandInfo

from commands import call
from spunge.cli import SIGNALS, app, main
from spunge.stopping import STOP

STOPPED = "spunge: stopped"
GO_ON = "; give the same command again to go on (what is finished is kept)"
PANIC = type("PanicException", (BaseException,), {})  # of a library in Rust


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (typer.Exit(3), 3, ""),
        (typer.Exit(0), 0, ""),
        (SystemExit(7), 7, ""),
        (
            ZeroDivisionError("by nothing"),
            1,
            "spunge: ZeroDivisionError: by nothing (SPUNGE_TRACEBACK=1 shows where)",
        ),
        (PANIC("Onig: retry-limit"), 1, "spunge: PanicException: Onig: retry-limit (SPUNGE_TRACEBACK=1 shows where)"),
        (KeyboardInterrupt(), 130, STOPPED),
        (typer.Exit(130), 130, STOPPED),
        (typer.BadParameter("odd"), 2, "spunge: Invalid value: odd"),
    ],
    ids=repr,
)
def test_whatever_ends_a_command_inside_reaches_the_shell(raised: BaseException, code: int, said: str) -> None:
    with patch("spunge.cli.listing.listing", side_effect=raised):
        ended = call("list")
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (code, said, "")


@pytest.mark.parametrize("info", app.registered_commands, ids=lambda info: info.callback.__name__)
def test_a_stop_tells_of_going_on_where_the_command_keeps_what_is_finished(info: CommandInfo) -> None:
    """Of a run, a search, a judging and a merge; a plan, say, has nothing to go on from."""

    def stopped() -> None:
        raise KeyboardInterrupt

    name = info.name or info.callback.__name__
    with patch.object(info, "callback", stopped), patch.object(info, "name", name):
        ended = call(name)
    keeps = name in ("run", "tune", "judge", "merge")
    assert (ended.returncode, ended.stderr.strip()) == (130, STOPPED + (GO_ON if keeps else ""))


def test_a_long_message_is_one_line_cut_in_the_middle() -> None:
    with patch("spunge.cli.listing.listing", side_effect=ValueError("first\n" + 4000 * "word\t" + "the mend")):
        [line] = call("list").stderr.splitlines()
    assert len(line) == 299
    assert line.startswith("spunge: ValueError: first word word")
    assert line.endswith("the mend (SPUNGE_TRACEBACK=1 shows where)")


@pytest.fixture
def on_ctrl_c() -> Iterator[Callable[[Any], Any]]:
    """on_ctrl_c(handler): what SIGINT does in this process until the test ends."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.mark.thorough
def test_an_interrupt_that_a_library_words_as_an_error_of_its_own_is_still_ctrl_c(
    on_ctrl_c: Callable[[Any], Any],
) -> None:
    """duckdb stops a query on SIGINT with an error that is no KeyboardInterrupt."""

    def long(kind: str) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        duckdb.sql("select max(hash(a.range + b.range)) from range(1000000) a, range(1000) b").fetchall()

    on_ctrl_c(signal.default_int_handler)
    with patch("spunge.cli.listing.listing", long):
        ended = call("list")
    assert (ended.returncode, ended.stderr.strip()) == (130, STOPPED)


def test_an_interrupt_that_a_callback_from_c_swallows_comes_again(on_ctrl_c: Callable[[Any], Any]) -> None:
    """As while code is compiled: nothing can be raised there, and no traceback is printed for it."""
    swallow = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))

    def long(kind: str) -> None:
        swallow()
        time.sleep(30)

    on_ctrl_c(signal.default_int_handler)
    started = time.monotonic()
    with patch("spunge.cli.listing.listing", long):
        ended = call("list")
    assert (ended.returncode, ended.stderr.strip()) == (130, STOPPED)
    assert time.monotonic() - started < 10


@pytest.mark.thorough
@pytest.mark.parametrize(("training", "number"), [(False, signal.SIGINT), (True, signal.SIGTERM)])
def test_a_second_signal_ends_the_process_at_once(training: bool, number: signal.Signals) -> None:
    """Also while it trains, where the first one only asks."""
    program = (
        "import os, signal, sys; from contextlib import nullcontext; from unittest.mock import patch\n"
        "from spunge.cli import main; from spunge.stopping import STOP\n"
        "def slow(kind):\n"
        f"  with STOP.looked_for() if {training} else nullcontext():\n"
        f"    try: os.kill(os.getpid(), {int(number)})\n"
        f"    finally: os.kill(os.getpid(), {int(number)}); print('goes on')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = ['spunge', 'list']\n"
        "with patch('spunge.cli.listing.listing', slow): main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (128 + number, "", "spunge: stopped at once")


@pytest.fixture
def heard() -> Iterator[None]:
    """The signals as a terminal's commands have them: the tests may run under nohup, which ignores one."""
    before = {number: signal.signal(number, usual) for number, usual in SIGNALS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_obeyed_at_once_where_nothing_works_in_steps_and_else_after_the_step(
    number: signal.Signals,
) -> None:
    reached: list[str] = []

    def asked(kind: str) -> None:
        with STOP.looked_for():
            os.kill(os.getpid(), number)
            reached.append("the step's end")
            STOP.obey()
        reached.append("beyond")

    def interrupted(kind: str) -> None:
        os.kill(os.getpid(), number)
        reached.append("beyond")

    for long in (asked, interrupted):
        with patch("spunge.cli.listing.listing", long):
            ended = call("list")
        assert (ended.returncode, ended.stderr.strip()) == (128 + number, STOPPED)
    assert reached == ["the step's end"]


def test_a_command_called_beside_the_main_thread_leaves_the_programs_handlers() -> None:
    inside: list[Any] = []

    def listing(kind: str) -> list[str]:
        inside.extend(map(signal.getsignal, SIGNALS))
        return []

    def command() -> None:
        with pytest.raises(SystemExit) as ended:
            main()
        inside.append(ended.value.code)

    before = [*map(signal.getsignal, SIGNALS)]
    with patch("spunge.cli.listing.listing", listing), patch("sys.argv", ["spunge", "list", "rules"]):
        thread = threading.Thread(target=command)
        thread.start()
        thread.join()
    assert inside == [*before, 0]


def test_what_the_system_refuses_outside_of_any_folder_is_one_line_with_the_file() -> None:
    error = OSError(errno.EIO, "Input/output error", "/models/base/config.json")
    with patch("spunge.cli.listing.listing", side_effect=error):
        ended = call("list")
    told = "spunge: cannot use '/models/base/config.json' (Input/output error)"
    assert (ended.returncode, ended.stderr.strip()) == (1, told)


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it(on_ctrl_c: Callable[[Any], Any]) -> None:
    def stop(kind: str) -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    on_ctrl_c(signal.SIG_IGN)
    with patch("spunge.cli.listing.listing", stop):
        assert call("list", "rules").returncode == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_help_says_of_each_command_a_whole_sentence() -> None:
    listed = call("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert len(listed) >= 13
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_version_and_help_need_no_command() -> None:
    shown = {words: call(*words) for words in ((), ("--help",), ("--version",))}
    assert [ended.returncode for ended in shown.values()] == [0, 0, 0]
    assert shown["--version",].stdout.strip() == version("spunge")
    assert shown[()].stdout == shown["--help",].stdout
    assert "Commands:" in shown[()].stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["run", "RECIPE", "--set", "unlearn.stesp=3"], "unlearn.stesp: no such setting; did you mean 'steps'?"),
        (["run", "RECIPE", "--set", "unlearn.layer=40"], "unlearn.layer: 40: the model has 4 blocks"),
        (["run", "RECIPE", "--set", "model.path=./nowhere"], "model.path: no folder"),
        (
            ["run", "RECIPE", "--set", "evaluate.0.question=qestion"],
            "evaluate.0.question: no column 'qestion'; did you mean 'question'?",
        ),
        (["run", "RECIPE", "--set", "retain=null"], "retain: missing"),
        (["run", "RECIPE", "--set", "unlearn.learning_rate=1e20"], "unlearn.learning_rate"),
        (["split", "RECIPE", "--set", "forget.where=nope > 1"], "forget.where: 'nope > 1'"),
        (["list", "methodes"], "did you mean 'methods'?"),
        (["init", "dmeo"], "did you mean 'demo'?"),
        (["report", "nowhere"], "'nowhere' holds no results.json"),
        (["compare", "nowhere"], "give two or more run folders"),
        (["compare", "nowhere", "elsewhere"], "'nowhere' holds no results.json"),
        (["rnu"], "rnu"),
        (["run", "RECIPE", "--ste", "a=b"], "--ste"),
    ],
)
def test_a_wrong_call_exits_2_with_one_line_and_no_traceback(
    recipe_file: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    ended = call(*[str(recipe_file) if word == "RECIPE" else word for word in arguments], cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    [error] = [line for line in ended.stderr.splitlines() if line.startswith("spunge: ")]
    assert said in error
    assert ended.stderr.splitlines()[-1] == error
    assert "Traceback" not in ended.stderr
