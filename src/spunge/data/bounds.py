"""Bounds of time and memory for a chat template, a program that came with the model and may go on for ever.

A thread beside looks every twentieth of a second, and raises an error in the one that renders. What a single step of a template
takes (`'a' * 10 ** 9`) is seen only when the step is done, so powers, whose size nothing bounds, are refused before.
"""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment

SECONDS = 20.0  # of one rendering; those of real templates take a millisecond
GROWTH = 2**30  # bytes by which the process may grow meanwhile
EVERY = 0.05
IDLE = 1.0  # seconds without a rendering after which the thread ends

Rendered = TypeVar("Rendered")


class BeyondBoundsError(Exception):
    """A template took too long, or too much memory."""


class _TooLongError(BeyondBoundsError):
    def __str__(self) -> str:  # raised by its class alone
        return f"it was stopped after {SECONDS:g} seconds"


class _TooLargeError(BeyondBoundsError):
    def __str__(self) -> str:
        return f"it was stopped when it had taken {GROWTH / 2**30:g} GiB of memory"


@dataclass
class _Rendering:
    began: float
    memory: int | None = None  # that the process held when it was first seen


_lock = threading.Lock()
_renderings: dict[int, _Rendering] = {}  # by the thread that renders
_watch = threading.Thread()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def bounded(render: Callable[[], Rendered]) -> Rendered:
    """What a template's rendering returns. Raises BeyondBoundsError where it is stopped."""
    global _watch
    own = threading.get_ident()
    with _lock:
        _renderings[own] = _Rendering(time.monotonic())
        if not _watch.is_alive():  # nor is it in a fork
            _watch = threading.Thread(target=_look, name="spunge-template", daemon=True)
            _watch.start()
    try:
        return render()
    finally:
        with _lock:
            _renderings.pop(own, None)


def holds_power(source: str) -> bool:
    """Whether a template's source takes a power: 9 ** 9 ** 9 takes hours, and no other thread runs meanwhile."""
    return any(kind == "operator" and text == "**" for _line, kind, text in Environment().lex(source))  # noqa: S701


def _memory() -> int:
    """Bytes that this process holds; at its peak, where the system does not tell what it holds now."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(pages) * resource.getpagesize()


def _look() -> None:
    global _watch
    last = time.monotonic()
    while True:
        time.sleep(EVERY)
        now, memory = time.monotonic(), _memory()
        with _lock:
            last = now if _renderings else last
            if now - last > IDLE:
                _watch = threading.Thread()
                return
            for thread, rendering in list(_renderings.items()):
                rendering.memory = memory if rendering.memory is None else rendering.memory
                if now - rendering.began > SECONDS:
                    _stop(thread, _TooLongError)
                elif memory - rendering.memory > GROWTH:
                    _stop(thread, _TooLargeError)


def _stop(thread: int, error: type[BeyondBoundsError]) -> None:
    del _renderings[thread]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
