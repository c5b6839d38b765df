"""Regular expressions that others wrote: an adapter's, and those of a configuration of quantised weights.

Python matches one by going back, for ever where it was written badly or in bad faith, and nothing in the same process can end
that. So those that may go back are tried first, on the very names that they are for, in a process that ends itself in time.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple

from spunge.errors import RecipeError

SECONDS = 5.0  # for all of an adapter's expressions on all names of a model; those that people write take milliseconds
_GOES_BACK = re.compile(r"[*+?{|]")
_PROGRAM = """
import faulthandler, json, re, sys
seconds, calls, names = json.load(sys.stdin)
faulthandler.dump_traceback_later(seconds, exit=True)
for number, (pattern, whole) in enumerate(calls):
    print(number, flush=True)
    try:
        compiled = re.compile(pattern)
    except re.error:
        continue
    match = compiled.fullmatch if whole else compiled.match
    for name in names:
        match(name)
"""


class Expression(NamedTuple):
    """What someone wrote, and how a library asks it of a name."""

    said: str  # who has it where, to begin an error with
    text: str
    form: str = "{}"  # the expression that the library makes of the text
    whole: bool = False  # whether it is to match all of a name, or its beginning

    @property
    def pattern(self) -> str:
        return self.form.format(self.text)


def refuse_no_expressions(expressions: Sequence[Expression]) -> None:
    """Raises RecipeError for a text that is no regular expression, or none where the library puts it."""
    for each in expressions:
        try:
            re.compile(each.text)
            re.compile(each.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"{each.said}, which is no regular expression there ({error})") from None


def refuse_endless(expressions: Sequence[Expression], names: Collection[str]) -> None:
    """Raises RecipeError for a regular expression that is not done with all names in time."""
    doubtful = [each for each in expressions if _GOES_BACK.search(each.text)]
    if not doubtful:
        return
    calls = [(each.pattern, each.whole) for each in doubtful]
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-S", "-c", _PROGRAM],
        input=json.dumps([SECONDS, calls, [*names]]),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        last = doubtful[int((ended.stdout.split() or ["0"])[-1])]
        raise RecipeError(
            f"{last.said}, a regular expression that is not done with the model's {len(names)} names after {SECONDS:g} s; write it "
            "without a repetition in a repetition, or write the names"
        )
