"""How the command ends: its exit code and the one line that says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that runs `program`, in which `main` and `patch` are at hand."""
    prelude = "import os, signal, sys, typer\nfrom unittest.mock import patch\nfrom spunge.cli import main\n"
    command = [sys.executable, "-c", prelude + program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=120, preexec_fn=heeding_ctrl_c
    )


def heeding_ctrl_c() -> None:
    """As in a terminal, also where the tests themselves were started in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("typer.Exit(3)", 3, ""),
        ("typer.Exit(0)", 0, ""),
        ("SystemExit(7)", 7, ""),
        (
            "ZeroDivisionError('by nothing')",
            1,
            "spunge: ZeroDivisionError: by nothing (SPUNGE_TRACEBACK=1 shows where)",
        ),
        ("KeyboardInterrupt", 130, "spunge: stopped; give the same command again to go on (what is finished is kept)"),
        ("typer.Exit(130)", 130, "spunge: stopped; give the same command again to go on (what is finished is kept)"),
        ("typer.BadParameter('odd')", 2, "spunge: Invalid value: odd"),
    ],
)
def test_whatever_ends_a_command_inside_reaches_the_shell(raised: str, code: int, said: str) -> None:
    done = python(
        f"with patch('spunge.cli.listing.listing', side_effect={raised}): sys.argv = ['spunge', 'list']; main()"
    )
    assert (done.returncode, done.stderr.strip(), done.stdout) == (code, said, "")


def test_a_long_message_is_one_line_cut_in_the_middle() -> None:
    raised = "ValueError('first\\n' + 4000 * 'word\\t' + 'the mend')"
    done = python(
        f"with patch('spunge.cli.listing.listing', side_effect={raised}): sys.argv = ['spunge', 'list']; main()"
    )
    [line] = done.stderr.splitlines()
    assert len(line) == 300
    assert line.startswith("spunge: ValueError: first word word")
    assert line.endswith("the mend (SPUNGE_TRACEBACK=1 shows where)")


def test_an_interrupt_that_a_library_words_as_an_error_of_its_own_is_still_ctrl_c() -> None:
    """duckdb stops a query on SIGINT with an error that is no KeyboardInterrupt."""
    program = (
        "import duckdb, threading\n"
        "def long(kind):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    duckdb.sql('select max(hash(a.range + b.range)) from range(1000000) a, range(1000) b').fetchall()\n"
        "with patch('spunge.cli.listing.listing', long): sys.argv = ['spunge', 'list']; main()\n"
    )
    done = python(program)
    assert done.returncode == 130, done.stderr
    assert "to go on" in done.stderr


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it() -> None:
    program = (
        "def stop(kind): os.kill(os.getpid(), signal.SIGINT); return []\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with patch('spunge.cli.listing.listing', stop): sys.argv = ['spunge', 'list', 'rules']; main()\n"
    )
    assert python(program).returncode == 0


def test_a_run_stopped_while_it_trains_exits_130_and_says_how_to_go_on(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    toy_recipe["unlearn"]["steps"] = 3000
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy_recipe))
    command = [sys.executable, "-m", "spunge.cli", "run", "toy.yaml", "--out", "run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_ctrl_c,
    )
    deadline = time.monotonic() + 100
    while not any(file.stat().st_size for file in tmp_path.glob("run/branches/*/log.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert errors.splitlines()[-1].startswith("spunge: stopped; give the same command again to go on")


def test_version_and_help_need_no_command() -> None:
    from importlib.metadata import version

    shown = {words: python(f"sys.argv = ['spunge', *{words!r}]; main()") for words in ((), ("--help",), ("--version",))}
    assert [done.returncode for done in shown.values()] == [0, 0, 0]
    assert shown["--version",].stdout.strip() == version("spunge")
    assert shown[()].stdout == shown["--help",].stdout
    assert "Commands:" in shown[()].stdout
