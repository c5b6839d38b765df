"""The command as a process: what starting, ending and stopping one shows and no call in this process can."""

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import call

STOPPED = "spunge: stopped; give the same command again to go on (what is finished is kept)"


def heeding_ctrl_c() -> None:
    """As in a terminal, also where the tests themselves were started in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, preexec_fn=heeding_ctrl_c)


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['spunge', '--help']\nfrom spunge.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'pydantic', 'datasets', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = python("-c", program)
    assert ended.returncode == 0, ended.stderr
    for command in ("run", "plan", "split", "report", "compare", "list", "init", "env"):
        assert f"\n  {command}" in ended.stdout


def test_the_package_runs_as_the_command_does() -> None:
    ended = python("-m", "spunge", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{version('spunge')}\n", "")
    wrong = python("-m", "spunge", "nope")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_run_prints_the_table_on_stdout_and_progress_on_stderr(recipe_file: Path, tmp_path: Path) -> None:
    ended = python("-m", "spunge", "run", str(recipe_file), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "accuracy" in ended.stdout
    assert "europe" in ended.stdout
    assert "report: " + os.path.join("runs", "toy", "report.html") in ended.stdout
    assert "unlearn branch:europe" in ended.stderr
    assert "unlearn" not in ended.stdout
    assert (tmp_path / "runs" / "toy" / "report.html").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "arguments",
    [["run", "toy.yaml", "--set", "unlearn.learning_rate=1e20"], ["split", "toy.yaml", "--set", "forget.where=nope"]],
)
def test_nothing_is_printed_after_the_line_that_says_what_is_wrong(
    recipe_file: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """Not even what libraries print at exit, such as nanobind's list of what the garbage collector did not reach."""
    ended = python("-m", "spunge", *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith(f"spunge: {arguments[-1].split('=')[0]}: ")
    assert "Traceback" not in ended.stderr


def test_a_run_stopped_while_it_trains_keeps_every_step_and_says_how_to_go_on(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """By a scheduler's SIGTERM; then, in this process, by Ctrl-C."""
    toy_recipe["unlearn"]["steps"] = 3000
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy_recipe))
    arguments = ("run", "toy.yaml", "--out", "run")
    with subprocess.Popen(
        [sys.executable, "-m", "spunge", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _signalled(process.pid, signal.SIGTERM, tmp_path, after=0)
        printed, errors = process.communicate(timeout=60)
    steps = _logged(tmp_path)
    assert (process.returncode, printed) == (143, "")
    assert [line for line in errors.splitlines() if line.startswith("spunge: ")] == [STOPPED]
    assert "Traceback" not in errors

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = threading.Thread(target=_signalled, args=(os.getpid(), signal.SIGINT, tmp_path, len(steps)))
    watch.start()
    ended = call(*arguments, cwd=tmp_path)
    watch.join()
    signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stdout, ended.stderr.splitlines()[-1:]) == (130, "", [STOPPED])
    assert len(steps) < len(_logged(tmp_path)) < 3000
    assert _logged(tmp_path)[: len(steps)] == steps  # with the seconds that each took: none was done again


def _signalled(process: int, number: int, folder: Path, after: int) -> None:
    """Send a signal once the run has done more than so many steps."""
    deadline = time.monotonic() + 100
    while len(_logged(folder)) <= after and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process, number)


def _logged(folder: Path) -> list[str]:
    """The lines of the first branch's log."""
    return [line for file in folder.glob("run/branches/*/log.jsonl") for line in file.read_text().splitlines()]
