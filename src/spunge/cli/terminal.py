"""What the commands share: options, printing, quick imports, and the line that says what went wrong."""

import gc
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from spunge.errors import ASKING, is_direction, one_line, printable, unprintable

if TYPE_CHECKING:
    from spunge.results import Results

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(one_line(f"spunge: {message}"), err=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit, also where SQL goes on in a thread that could not be stopped: nothing of it would end in order."""
    if any(thread.name == ASKING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def loading() -> Iterator[None]:
    """Import large libraries without the garbage collector, which finds nothing in them and costs up to a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet() -> None:
    """Keep other libraries' progress bars and advice off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def say(text: str) -> None:
    """Print lines on stdout. What stands in them is shown and never obeyed by the terminal."""
    typer.echo(printable(text, keep="\n"))


def print_json(value: Any) -> None:
    """Print JSON for scripts; what a terminal would obey is escaped, which means the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(re.sub(r"[^ -~\n]", lambda found: _escaped(found.group()), text))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if unprintable(character) or is_direction(character) else character


def print_scores(results: "Results") -> None:
    """As wide as the terminal allows; whole and plain where the output is none."""
    from spunge.report.table import results_table, results_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console(emoji=False).print(results_table(results))
    else:
        say(results_text(results))


def near(path: Path) -> str:
    """A path as a person would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
