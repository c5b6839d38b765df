"""What the commands share: options, printing, quick imports, and the line that says what went wrong."""

import atexit
import gc
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from spunge.errors import ASKING, is_direction, one_line, printable, redacted, unprintable

if TYPE_CHECKING:
    from spunge.results import Results

SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting: a.b=value. May be repeated.")]
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
    if code > 128:
        # Stopped: frames that a library holds may keep DuckDB's objects, and it would tell of them after our last line.
        atexit.register(_end_quietly)
    sys.exit(code)


def _end_quietly() -> None:
    """Say nothing more on stderr."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


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
    os.environ.setdefault("RUST_BACKTRACE", "0")

    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _warned  # where in a library it was said is of no use here
    _logs_told()


def _warned(message: Warning | str, *_where: Any, **_more: Any) -> None:
    typer.echo(one_line(f"warning: {message}"), err=True)


def _logs_told() -> None:
    """Whatever a library logs is shown and not obeyed."""
    made = logging.getLogRecordFactory()
    if isinstance(made, partial) and made.func is _told:
        return
    logging.setLogRecordFactory(partial(_told, made))


def _told(made: Callable[..., logging.LogRecord], *arguments: Any, **more: Any) -> logging.LogRecord:
    record = made(*arguments, **more)
    with suppress(TypeError, ValueError):  # arguments that do not fit are logging's to tell
        record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
    return record


def show_traceback(error: BaseException) -> None:
    """Python's own traceback on stderr."""
    text = "".join(traceback.format_exception(error))
    typer.echo(printable(text, keep="\n").rstrip("\n"), err=True)


def say(text: str) -> None:
    """Print lines on stdout. What stands in them is shown and never obeyed by the terminal."""
    typer.echo(printable(text, keep="\n"))


def tell(text: str) -> None:
    """Print a line on stderr that is no error."""
    typer.echo(one_line(text), err=True)


def tell_carried(recipe: str, overrides: Sequence[str]) -> None:
    """Say what a recipe's settings are to another method that an override names."""
    from spunge.recipe.carried import carried_told

    if told := carried_told(recipe, overrides):
        tell(told)


def say_on(text: str) -> None:
    """Print a piece of a line on stdout, at once."""
    typer.echo(printable(text, keep="\n"), nl=False)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print JSON for scripts; what a terminal would obey is escaped, which means the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(re.sub(r"[^ -~\n]", lambda found: _escaped(found.group()), redacted(text)))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if unprintable(character) or is_direction(character) else character


def print_scores(results: "Results") -> None:
    """As wide as the terminal allows; whole and plain where the output is none."""
    from spunge.report.table import results_table, results_text
    from spunge.report.text import remarks_text

    if not results.rows:
        pass  # the table would be a heading alone
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(emoji=False).print(results_table(results))
    else:
        say(results_text(results).rstrip("\n"))
    if remarks := remarks_text(results):
        say(remarks.rstrip("\n"))


def near(path: Path) -> str:
    """A path as a person would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
