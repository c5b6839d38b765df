"""Runs in processes of their own, which tests kill and start again, and what is the same of two runs.

They are forks of a process that has imported what they need: to import it takes each longer than its run. That a command, and a
process that makes stages for one, starts from nothing is held by tests/cli/test_process.py and by test_processes.py, where this
process gives the stages out.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from spunge.stopping import STOP

T = TypeVar("T")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "spunge.cli",
        "spunge.run.executors.worker",
        "spunge.run.pipeline",
        "spunge.unlearning.npo",
        "spunge.evaluation.perplexity",
        "spunge.merging.engine",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.tokenization_utils_tokenizers",
    ]
)
HELD = "HELD_BY_A_TEST"  # names a file: while it is there, no training goes on after STEPS_HELD steps until it is told to stop
STEPS_HELD = 6
TWO = ("execution.kind=processes", "execution.per_device=2")
# How many processes a command starts; those of a sharded training are all started anew where one is gone.
STARTS = {"execution.kind=processes": 2, "execution.kind=sharded": 4}
# What two undisturbed runs differ in: what they took.
TOOK = re.compile(
    r'"(seconds|peak_memory)": [0-9.e-]+,?|"(xxh3|check|key)": "[0-9a-f]+"|"size": \d+|([0-9.]+ (h|min|s|GiB|MiB)\b ?)+'
    # In the page: when, and the stages by what they took.
    r"|<time>[^<]*</time>|(?s:<details><summary>Time of each stage</summary>.*?</details>\s*)"
)


def content(run: Path) -> dict[str, bytes | str]:
    """Every file of a run, without what it took. A key of a merge has the times of the deltas' files in it."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    timed = {".json", ".jsonl", ".html"}
    return {
        str(path.relative_to(run)): TOOK.sub("", path.read_text()) if path.suffix in timed else path.read_bytes()
        for path in files
    }


def children(parent: int) -> list[int]:
    """The processes that one started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


class Command:
    """`spunge run` in a process of its own. held: HELD, or none."""

    def __init__(self, recipe: Path, out: Path, *overrides: str, held: Path | None = None) -> None:
        settings = [part for override in overrides for part in ("--set", override)]
        arguments = ["run", str(recipe), "--out", str(out), *settings]
        self._errors = out.with_name(f"{out.name}-{time.monotonic_ns()}.stderr")
        self._errors.parent.mkdir(parents=True, exist_ok=True)
        self._errors.touch()
        spares = sum(STARTS.get(override, 0) for override in overrides)
        environment = {**os.environ, **({HELD: str(held)} if held else {})}
        self.process = FORKS.Process(target=_called, args=(arguments, environment, self._errors, spares), daemon=True)
        self.process.start()

    def children(self) -> list[int]:
        return children(self.process.pid or 0)

    def ended(self, within: float = 300.0) -> tuple[int, str]:
        self.process.join(within)
        assert self.process.exitcode is not None, self._errors.read_text()
        return self.process.exitcode, self._errors.read_text()


def _called(arguments: list[str], environment: Mapping[str, str], errors: Path, spares: int) -> None:
    """The command, in a session of its own as in a terminal; what it prints is thrown away, what it says goes to a file."""
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _settled(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["spunge", *arguments]
    from spunge.cli import main

    with spared(spares):
        main()


def forked(call: Callable[..., T], *given: Any, spares: int = 0, within: float = 300.0) -> T:
    """What a call gives in a fork of the process that has imported what it needs. spares: how many of the processes that make
    stages for it are forks too."""
    mine, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_answered, args=(theirs, call, given, dict(os.environ), spares), daemon=True)
    process.start()
    theirs.close()
    assert mine.poll(within), "it gives nothing"
    good, value = mine.recv()
    process.join(within)
    assert good, value
    return value


def _answered(
    pipe: "Connection[Any, Any]", call: Callable[..., Any], given: Any, environment: Mapping[str, str], spares: int
) -> None:
    _settled(environment)
    try:
        with spared(spares):
            value = True, call(*given)
    except BaseException:
        value = False, traceback.format_exc()
    pipe.send(value)


@contextmanager
def spared(count: int) -> Iterator[None]:
    """Inside the block so many of the processes that make stages for this one are forks of it, as it is now."""
    from spunge.run.executors import processes

    waiting = [_spare() for _ in range(count)]

    def started(command: list[str], **how: Any) -> Any:
        return Spare(*waiting.pop(0), command[-1], how) if waiting else subprocess.Popen(command, **how)

    vars(processes)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": started})
    try:
        yield
    finally:
        vars(processes)["subprocess"] = subprocess
        for pid, pipe in reversed(waiting):  # the later one holds what ends the earlier one
            pipe.close()
            os.waitpid(pid, 0)


def _settled(environment: Mapping[str, str]) -> None:
    """Make this process one of that environment."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if HELD in environment:
        from spunge.unlearning import loop

        vars(loop)["STOP"] = Holding(Path(environment[HELD]))


class Holding:
    """Stands for the STOP that a training looks for after each step."""

    def __init__(self, held: Path) -> None:
        self.looked_for = STOP.looked_for
        self._held = held
        self._steps = 0

    @property
    def asked(self) -> bool:
        self._steps += 1
        while self._steps >= STEPS_HELD and self._held.exists() and not STOP.asked:
            time.sleep(0.02)
        return STOP.asked


def _spare() -> "tuple[int, Connection[Any, Any]]":
    """A fork of this process that waits to be given a program; it ends with this one, or when its pipe is closed."""
    mine, theirs = FORKS.Pipe()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, mine
    try:
        mine.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        program, environment, number = theirs.recv()
        handle = recv_handle(theirs)
        theirs.close()
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(2, 1)
        _settled(environment)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        exec(program, {})
    except EOFError:  # it is not needed
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class Spare:
    """Stands for a subprocess.Popen of Python: a spare fork that is given the program."""

    def __init__(self, pid: int, pipe: "Connection[Any, Any]", program: str, how: Mapping[str, Any]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()
        (number,) = how["pass_fds"]
        pipe.send((program, how["env"], number))
        send_handle(pipe, number, pid)
        pipe.close()
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()

    def wait(self, timeout: float | None = None) -> None:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("spare", timeout or 0.0)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # waited for, and not yet told
            if not self._ended.is_set():
                os.kill(self.pid, signal.SIGKILL)


def until(holds: Callable[[], Any], seconds: float = 200.0) -> Any:
    """What it gives, once that is true."""
    stop = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < stop, "it never came to that"
        time.sleep(0.02)
    return value


def steps(run: Path, branch: str) -> int:
    """How many steps a branch's log has."""
    log = run / "branches" / branch / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kept(run: Path) -> set[str]:
    """The branches of which a stopped run holds a state, and those that were finished before the stop."""
    states = {file.parent.name for file in (run / "branches").glob("*/state-*.pt")}
    return states | {file.stem for file in (run / "stamps" / "branch").glob("*.json")}


def at_work(run: Path) -> bool:
    return steps(run, "asia") > 3 and steps(run, "europe") > 3


def under_way(recipe: Path, run: Path, *overrides: str, held: Path | None = None, within: float = 200.0) -> Command:
    """A command both of whose branches are in training. held: a file that is made; until it is removed, they stay there."""
    if held is not None:
        held.touch()
    command = Command(recipe, run, *overrides, held=held)
    until(lambda: at_work(run), within)
    return command
