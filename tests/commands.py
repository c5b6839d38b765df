"""The `spunge` command, called in this process: what it printed where, and its exit code."""

import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from spunge.cli import SIGNALS, main
from spunge.stopping import STOP


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def call(*arguments: str, cwd: Path | None = None) -> Ended:
    """As a shell would call it in `cwd`; what it sets in this process is set back."""
    printed, errors = StringIO(), StringIO()
    with ExitStack() as back:
        back.callback(os.chdir, Path.cwd())
        for number in SIGNALS:
            back.callback(signal.signal, number, signal.getsignal(number))
        back.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        back.callback(setattr, STOP, "asked", STOP.asked)
        back.enter_context(patch.dict(os.environ))
        back.enter_context(patch.object(sys, "argv", ["spunge", *arguments]))
        back.enter_context(redirect_stdout(printed))
        back.enter_context(redirect_stderr(errors))
        os.chdir(cwd or Path.cwd())
        try:
            main()
        except SystemExit as ended:
            return Ended(int(ended.code or 0), printed.getvalue(), errors.getvalue())
    raise AssertionError("main() came back without an exit code")
