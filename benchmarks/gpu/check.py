"""The check on a GPU: one step after the other, each with a time of its own, and what was measured in a file as it comes.

    bash benchmarks/gpu/check.sh --out DIR               # on a GPU, under 8 minutes
    bash benchmarks/gpu/check.sh --toy --out DIR         # on a CPU, at toy size
    python benchmarks/gpu/check.py table DIR/result.json # the tables of docs/benchmarks/gpu.md

A step that fails, or takes too long, says so, and the next one goes on.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NEEDED = 40 * 2**30  # bytes that the models, deltas and outputs take at once, at the most
# The steps, and the seconds that each may take; the dearest come last. Names: what is done, and with which model.
STEPS: dict[str, float] = {
    "card": 60,
    "tests": 100,
    "model-1b": 60,
    "rmu-1b": 60,
    "tvn-1b": 60,
    "npo-1b": 60,
    "ga-1b": 60,
    "head-1b": 60,
    "forms-1b": 100,
    "pairs-1b": 80,
    "merge-1b": 110,
    "run-1b": 90,
    "model-7b": 90,
    "rmu-7b": 100,
    "npo-7b": 100,
    "npo_again-7b": 100,
    "npo_4bit-7b": 100,
    "npo_4bit_again-7b": 100,
    "npo_8bit-7b": 100,
    "ga_adam_8bit-7b": 120,
}
COUNTS = {f"count-{method}": 60.0 for method in ("rmu", "tvn", "npo", "ga")}  # at toy size alone
COLUMNS = "model | method | batch | s a step | tokens/s | share of matmul rate | peak GiB | planned GiB (over it) | time over plan"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    run.add_argument("--limit", type=float, default=430, help="seconds for all steps together")
    worker = commands.add_parser("worker")
    worker.add_argument("channel", type=int)
    for each in (run, worker):
        each.add_argument("--toy", action="store_true")
        each.add_argument("--work", type=Path, help="a folder for models; by default in memory where there is room")
        each.add_argument("--only", nargs="*", default=[], help="steps")
    commands.add_parser("table").add_argument("file", type=Path)
    given = parser.parse_args()
    if given.command == "table":
        print(table(json.loads(given.file.read_text())))
    elif given.command == "worker":
        work(given)
    else:
        sys.exit(check(given))


# ---- the driver


def check(given: argparse.Namespace) -> int:
    started = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    room = given.work or Path(tempfile.mkdtemp(prefix="spunge-gpu-", dir=_room()))
    room.mkdir(parents=True, exist_ok=True)
    steps = {**STEPS, **COUNTS} if given.toy else STEPS
    limits = {name: limit for name, limit in steps.items() if not given.only or name in given.only}
    content: dict[str, Any] = {"toy": given.toy, "work": str(room), "limit": given.limit, "steps": {}}
    try:
        _run_all(given, room, limits, content, started)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    _say(started, f"done; {given.out / 'result.json'}")
    print(table(content), flush=True)
    return 1 if any("error" in step for step in content["steps"].values()) else 0


def _room() -> str | None:
    """In memory, where twice as much is free."""
    memory = Path("/dev/shm")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > NEEDED and free > 2 * NEEDED
    return str(memory) if roomy else None


def _run_all(
    given: argparse.Namespace, room: Path, limits: dict[str, float], content: dict[str, Any], started: float
) -> None:
    """Start a worker for the steps that are left, until there are none or the time is over. One that ends early, or is
    stopped, costs the step that it was at."""
    left, steps = list(limits), content["steps"]
    with (given.out / "log.txt").open("w") as log:
        while left:
            current = None
            for message in _messages(given, room, left, limits, started, log):
                current = message["step"]
                if current in left:
                    left.remove(current)
                steps.setdefault(current, {}).update(message["figures"])
                if message["ended"]:
                    _say(started, f"{current}: {_line(steps[current], steps)}")
                    current = None
                _write(given.out / "result.json", content)
            if current is not None and "error" not in steps[current]:
                steps[current]["error"] = "its process ended"
            if current is not None:
                _say(started, f"{current}: {_line(steps[current], steps)}")
            if current is None and left:
                over = time.monotonic() - started >= given.limit
                reason = "no time was left" if over else "the worker did not start; see log.txt"
                steps.update({name: {"error": reason} for name in left})
                _say(started, f"{', '.join(left)}: {reason}")
                left = []
            _write(given.out / "result.json", content)


def _messages(
    given: argparse.Namespace, room: Path, left: Sequence[str], limits: dict[str, float], started: float, log: Any
) -> Iterator[dict[str, Any]]:
    """What a worker tells, until it ends. It is stopped when a step takes too long, or the time for all is over."""
    read, write = os.pipe()
    command = [sys.executable, __file__, "worker", str(write), "--work", str(room), *(["--toy"] if given.toy else [])]
    process = subprocess.Popen(
        [*command, "--only", *left],
        stdout=log,
        stderr=log,
        pass_fds=(write,),
        start_new_session=True,
        env={**os.environ, "SPUNGE_CACHE": str(room / "cache")},  # nothing is taken from an earlier check
    )
    os.close(write)
    told: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        with os.fdopen(read) as lines:
            for line in lines:
                told.put(line)
        told.put(None)

    threading.Thread(target=listen, daemon=True).start()
    over, step, ends = started + given.limit, "", time.monotonic() + 120
    try:
        while True:
            try:
                line = told.get(timeout=max(0.0, min(ends, over) - time.monotonic()))
            except queue.Empty:
                if step:
                    reason = "over its time" if time.monotonic() < over else "no time was left for the rest of it"
                    yield {"step": step, "figures": {"error": reason}, "ended": False}
                return
            if line is None:
                return
            message = json.loads(line)
            if message["step"] != step:
                step, ends = message["step"], time.monotonic() + limits[message["step"]]
            yield message
            if message["ended"]:
                ends = time.monotonic() + 60
                step = ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write(file: Path, content: dict[str, Any]) -> None:
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(file)


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)


def _line(figures: dict[str, Any], steps: dict[str, Any]) -> str:
    """A step's figures in a line."""
    shown = {**figures, **({"share": share} if (share := _share(figures, steps)) is not None else {})}
    return ", ".join(f"{name} {_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(figures: dict[str, Any], steps: dict[str, Any]) -> float | None:
    """Of the measured rate of a large matrix product."""
    rate = steps.get("card", {}).get("matmul_tflops")
    return figures["tflops"] / rate if rate and "tflops" in figures else None


# ---- the worker


def work(given: argparse.Namespace) -> None:
    """Run steps, and tell through a pipe what each measures; stdout and stderr are the log's."""
    from steps import full, perform, toy

    size = (toy if given.toy else full)(given.work)
    with os.fdopen(given.channel, "w") as channel:

        def tell(step: str, figures: dict[str, Any], ended: bool = False) -> None:
            channel.write(json.dumps({"step": step, "figures": figures, "ended": ended}) + "\n")
            channel.flush()

        for name in given.only:
            print(f"---- {name}", flush=True)
            tell(name, {})
            begun = time.perf_counter()
            try:
                perform(name, size, lambda name=name, **figures: tell(name, figures))
                failed = {}
            except Exception as error:  # whatever it is, the next step goes on
                traceback.print_exc()
                failed = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            tell(name, {**failed, "step_took": round(time.perf_counter() - begun, 2)}, ended=True)


# ---- the tables


def table(content: dict[str, Any]) -> str:
    """Markdown rows of what was trained, and the other figures in lines."""
    steps = content["steps"]
    lines = [_card_line(steps.get("card", {})), ""]
    lines += [f"| {COLUMNS} |", "|---" * len(COLUMNS.split(" | ")) + "|"]
    trained = [name for name in STEPS if "planned_gib" in steps.get(name, {})]
    lines += [_row(name, steps[name], steps) for name in trained]
    others = [name for name in (*STEPS, *COUNTS) if name in steps and name not in ("card", *trained)]
    lines += ["", *(f"- {name}: {_line(steps[name], steps)}" for name in others)]
    return "\n".join(lines)


def _card_line(figures: dict[str, Any]) -> str:
    if "copy_gb_s" not in figures:
        return f"The device: {figures}"
    return (
        f"{figures.get('card', 'CPU')}, torch {figures['torch']}, transformers {figures['transformers']}: matrix product "
        f"{figures['matmul_tflops']:.4g} TFLOP/s, copy {figures['copy_gb_s']:.4g} GB/s"
    )


def _row(name: str, figures: dict[str, Any], steps: dict[str, Any]) -> str:
    method, _, model = name.partition("-")
    if "tokens_s" not in figures:
        return f"| {model} | {method} | {figures.get('error', 'not run')} | | | | | | |"
    share = _share(figures, steps)
    cells = [
        model,
        method,
        f"{figures['batch']}",
        f"{figures['step_seconds']:.3f}",
        f"{figures['tokens_s']:,.0f}",
        "" if share is None else f"{share:.0%}",
        f"{figures['peak_gib']:.1f}",
        f"{figures['planned_gib']:.1f} ({figures['memory_over_plan']:.2f})",
        f"{figures['time_over_plan']:.2g}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
