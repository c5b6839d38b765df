"""Commands of spunge in forks of a process that has imported all they need: one starts in milliseconds, and any may be killed.

`soak.py` kills them, `faults.py` lets the disk refuse them what they ask.
"""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")
os.environ.update(TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
# What differs between two undisturbed commands: what they took, and in merge.json a key with the times of the deltas' files.
TIMES = re.compile(
    r'"(seconds|peak_memory)": [0-9.e-]+,?|"xxh3": "[0-9a-f]+"|"size": \d+|"check": "[0-9a-f]+"|[0-9.]+ (s|min|h|GiB|MiB)\b'
    # In the page: when, and the stages by what they took.
    r"|<time>[^<]*</time>|(?s:<details><summary>Time of each stage</summary>.*?</details>\s*)"
)
TIMED = re.compile(
    r"(?:.*/)?(?:stamps/.*\.json|[^/]*delta\.json|(?:teaching|search)\.json|[^/]*log\.jsonl|results\.json|report\.html)"
)
KEYED = re.compile(r'"key": "[0-9a-f]+"')
# Of the process at work; and what a search told Optuna and when, every stop too. Its trials are compared themselves.
OWN = {".lock", "trials.journal"}
Traced = Callable[[str], None]


class Ended(NamedTuple):
    """How a command ended: its exit code, or minus the signal that killed it."""

    code: int
    errors: str
    seconds: float

    @property
    def last(self) -> str:
        return (self.errors.splitlines() or [""])[-1]


@dataclass(frozen=True)
class Command:
    """A call of spunge in a folder of its own, which holds what it writes: `out`."""

    kind: str
    arguments: tuple[str, ...]
    out: str
    cache: str = "cache"

    @property
    def is_merge(self) -> bool:
        return self.arguments[0] == "merge"

    def runs(self, folder: Path) -> list[str]:
        """The runs that it left so far: one, or those of a search; of a merge none. Below `folder`."""
        stamped = [] if self.is_merge else sorted((folder / self.out).glob("**/stamps"))
        return [str(stamps.parent.relative_to(folder)) for stamps in stamped]


@dataclass(frozen=True)
class Child:
    """A fork at work."""

    pid: int
    log: Path
    started: float = field(default_factory=time.perf_counter)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, within: float | None = None) -> Ended | None:
        """How it ended; None where it goes on after so many seconds."""
        stop = None if within is None else time.perf_counter() + within
        while True:
            pid, status = os.waitpid(self.pid, 0 if stop is None else os.WNOHANG)
            if pid:
                errors = self.log.read_text(encoding="utf-8", errors="replace")
                return Ended(os.waitstatus_to_exitcode(status), errors, time.perf_counter() - self.started)
            if stop is not None and time.perf_counter() >= stop:
                return None
            time.sleep(0.002)


def start(command: Command, folder: Path, prepared: Callable[[], None] = lambda: None) -> Child:
    """Call spunge in a fork, in `folder`. prepared: called in the fork first."""
    folder.mkdir(parents=True, exist_ok=True)
    _logs(folder).mkdir(exist_ok=True)
    log = _logs(folder) / f"stderr-{os.urandom(4).hex()}"
    log.touch()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        os.environ["SPUNGE_CACHE"] = str(folder / command.cache)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["spunge", *command.arguments]
        torch.set_num_threads(1)  # its pool did not come along; here no second thread asks for it at the same time
        _watch(_logs(folder) / "trace")
        prepared()
        from spunge.cli import STOPPED, main

        main()
    except KeyboardInterrupt:  # before main() could hear it
        code = STOPPED
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def call(command: Command, folder: Path, prepared: Callable[[], None] = lambda: None) -> Ended:
    """The same, waited for."""
    ended = start(command, folder, prepared).ended()
    assert ended is not None
    return ended


def _logs(folder: Path) -> Path:
    """Where the checks keep their own files: not in the folder whose disk they disturb."""
    return folder.with_name(f"{folder.name}-log")


def remove(folder: Path) -> None:
    """A folder that commands were called in, and what they printed there."""
    shutil.rmtree(folder)
    shutil.rmtree(_logs(folder))


def _watch(trace: Path) -> None:
    """Note the stages as they begin, and the tensors of a merge as they are done; save each training's state at every step."""
    import spunge.run.schedule as schedule
    import spunge.run.train as train
    from spunge.merging import engine, output
    from spunge.unlearning.method import Task

    handle = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(line: str) -> None:
        os.write(handle, f"{line}\n".encode())

    room, done = schedule.Schedule.make_room, output.Output.note_done

    def noted_room(self: Any, stage: Any) -> None:
        note(f"stage {self.folder.relative_to(Path.cwd())}: {stage.name}")
        room(self, stage)

    def noted_done(self: Any, name: str, tally: Any) -> None:
        done(self, name, tally)
        note(f"tensor {name}")

    schedule.Schedule.make_room = noted_room  # type: ignore[method-assign]
    output.Output.note_done = noted_done  # type: ignore[method-assign]
    vars(train).update(Task=functools.partial(Task, save_seconds=0.0))
    engine.BATCH = 1  # a line of the journal for each tensor


def preload(commands: Mapping[str, Command], folder: Path) -> None:
    """Import here what the commands import, as a fork of each finds out, which also fills caches of compiled code."""
    importlib.import_module("spunge.cli")
    for command in commands.values():
        listed = folder / f"{command.kind}.modules"

        def told(listed: Path = listed) -> None:
            def write(code: int) -> None:
                listed.write_text(json.dumps(list(sys.modules)))
                leave(code)

            leave = os._exit
            os._exit = write  # type: ignore[assignment]

        ended = call(command, folder / command.kind, told)
        if ended.code:
            raise RuntimeError(f"{command.kind}: {ended.errors}")
        for name in json.loads(listed.read_text()):
            if name not in sys.modules and name != "spunge.__main__":
                try:
                    importlib.import_module(name)
                except Exception:
                    continue


def content(command: Command, folder: Path) -> dict[str, Any]:
    """All that a finished command left, file by file, but for what times and sizes of the process are in it."""
    out = folder / command.out
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in OWN]
    beside = [f"beside: {path.name}" for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]
    return {str(file.relative_to(out)): _plain(file, out) for file in files} | dict.fromkeys(beside, "left")


def _plain(file: Path, out: Path) -> Any:
    if file.name == "merge.json":
        return KEYED.sub("", file.read_text(encoding="utf-8"))
    if not TIMED.fullmatch(str(file.relative_to(out))):
        return file.read_bytes()
    return TIMES.sub("", file.read_text(encoding="utf-8"))


def differing(command: Command, folder: Path, whole: Mapping[str, Any]) -> list[str]:
    """Files that are not those of an undisturbed command, which left `whole`."""
    there = content(command, folder)
    return sorted(name for name in there.keys() | whole.keys() if there.get(name) != whole.get(name))


def stamped(command: Command, folder: Path) -> set[str]:
    """What is vouched for: stages of a run; what a merge's journal says is written."""
    out = folder / command.out
    if not command.is_merge:
        from spunge.run.stamps import stamps_in

        return {f"stage {run}: {stamp.stage}" for run in command.runs(folder) for stamp in stamps_in(folder / run)}
    journal = out.with_name(f".{out.name}.merging") / "journal.jsonl"
    return {f"tensor {line['tensor']}" for line in _lines(journal) if "tensor" in line}


def _lines(file: Path) -> Iterator[Any]:
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def begun(folder: Path) -> list[str]:
    """What commands in a folder have begun so far."""
    trace = _logs(folder) / "trace"
    return trace.read_text().splitlines() if trace.exists() else []
