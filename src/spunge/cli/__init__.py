"""The `spunge` command. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 2 the recipe or the call is wrong (one line that names the setting, the value and what to do); 130 stopped
by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; 1 else. Heavy imports are inside the commands, so that `spunge --help` is quick.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated, Any

import typer

from spunge.cli import chat, export, judge, merge, push, report, run, start, tune, view
from spunge.cli.terminal import fail, leave, say, show_traceback
from spunge.errors import LostError, RecipeError, is_panic
from spunge.stopping import STOP

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make an open-weight language model forget, part by part, and measure what was forgotten and what was kept.",
)
for command in (
    run.run,
    run.plan,
    run.split,
    run.status,
    run.verify,
    run.clean,
    report.report,
    report.compare,
    judge.judge,
    chat.chat,
    view.view,
    push.push,
    export.export,
    tune.tune,
    judge.probe,
    merge.merge,
):
    app.command()(command)
app.command("list")(start.list_)
app.command()(start.init)
app.command()(start.env)

# What asks a command to stop: Ctrl-C, a scheduler, a terminal that is closed; and what each does where nobody set it otherwise.
SIGNALS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
if sys.platform != "win32":
    SIGNALS[signal.SIGHUP] = signal.SIG_DFL
STOPPED = 128 + signal.SIGINT  # as shells say it
# The commands that keep what is finished, so that the same command takes it up; another one stopped is just given again.
KEEPING = {"run", "tune", "judge", "merge"}
GO_ON = "; give the same command again to go on (what is finished is kept)"
GOES_ON = "; the same command goes on from what is finished"
AGAIN = 0.02  # seconds after which an interrupt that was swallowed comes again
# What typer raises about a call, such as an unknown option: click's own class, or the copy that newer typers carry.
CallError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if context.obj is not None:  # it is where the command is begun by main
        context.obj.command = context.invoked_subcommand or ""
    if version:
        from spunge import __version__

        say(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


class _Signals:
    """The first one stops the command in order, after a step of training; the second one at once, as a kill would, of which
    nothing is lost."""

    def __init__(self) -> None:
        self.command = ""  # that is at work
        self.code = 0  # to exit with, once one came
        self.ended = False  # the command is, and its last line is being said
        self._process = os.getpid()
        self._swallowed: int | None = None

    def advice(self, told: str) -> str:
        """What is told of going on, for a command that can."""
        return told if self.command in KEEPING else ""

    def heed(self) -> None:
        """From here on, unless another part of this process does, or a shell has them ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, usual in SIGNALS.items():
            if signal.getsignal(number) is usual:
                signal.signal(number, self._came)
        sys.unraisablehook = self._raised_in_vain

    def _came(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that a library forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.ended:
            os._exit(128 + number)
        if self.code and self._swallowed != number:
            os.write(2, f"\nspunge: stopped at once{self.advice(GO_ON)}\n".encode())
            os._exit(128 + number)
        self.code, self._swallowed = self.code or 128 + number, None
        if not STOP.ask():
            raise KeyboardInterrupt
        if os.isatty(2):
            os.write(2, b"\nspunge: stops after this step; once more stops at once\n")

    def _raised_in_vain(self, told: Any) -> None:
        """An error where nothing can be raised, such as in a callback from C: the signal comes again outside of it."""
        if not (self.code and told.exc_type is KeyboardInterrupt):
            sys.__unraisablehook__(told)
            return
        self._swallowed = self.code - 128
        again = threading.Timer(AGAIN, signal.pthread_kill, (threading.main_thread().ident, self._swallowed))
        again.daemon = True
        again.start()


def main() -> None:
    """Run the command and turn what went wrong into an exit code."""
    STOP.asked = False
    signals = _Signals()
    signals.heed()
    try:
        # Not standalone, typer gives the code of an Exit back in place of raising it; commands themselves return None.
        message, code = "", app(standalone_mode=False, obj=signals) or 0
    except BaseException as error:
        message, code = _explained(error, signals.advice(GOES_ON))
    signals.ended = True
    # Libraries turn a KeyboardInterrupt into errors of their own: typer into an Exit, duckdb into a RuntimeError.
    if signals.code or code == STOPPED:
        message, code = f"stopped{signals.advice(GO_ON)}", signals.code or STOPPED
    # Outside of the except block, nothing holds what the command had open any more.
    if message:
        fail(message, code)
    leave(code)


def _explained(error: BaseException, advice: str) -> tuple[str, int]:
    """What went wrong, and the exit code. What is no error of a command is raised again. advice: how the command goes on."""
    if isinstance(error, RecipeError):
        return str(error), 2
    if isinstance(error, LostError):
        return str(error), 1
    if isinstance(error, CallError):
        return error.format_message(), 2
    if isinstance(error, KeyboardInterrupt):
        return "", STOPPED
    if not (isinstance(error, Exception) or is_panic(error)):
        raise error
    if os.environ.get("SPUNGE_TRACEBACK"):
        show_traceback(error)
        return "", 1
    if isinstance(error, OSError) and error.errno is not None:
        from spunge.files import file_of

        if (file := file_of(error)) is not None:
            return f"cannot use {str(file)!r} ({error.strerror}){advice}", 1
    if "torch" in sys.modules:
        from spunge.model.memory import is_out_of_memory

        if is_out_of_memory(error):
            return (
                "out of memory; lower unlearn.batch_size and max_length, or give a smaller model, dtype or another device"
                + advice,
                1,
            )
    return f"{type(error).__name__}: {error} (SPUNGE_TRACEBACK=1 shows where)", 1
