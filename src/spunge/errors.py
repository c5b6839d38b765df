"""The errors that people see: one line that names the setting, the value and what to do, as a terminal can show it.

What is shown holds no token and no key: of the Hub, of services, in an address, or in this process's environment.
"""

import difflib
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

ASKING = "spunge-sql"  # the name of a thread that may not hear that it is to stop
_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


HIDDEN = "[secret]"
# Tokens of the Hub, OpenAI and its like, GitHub, GitLab, Slack, AWS and Google; what stands before a host, or as a key after it.
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|"
    r"glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|A(?:KI|SI)A[A-Z0-9]{16}|AIza[\w-]{35})"
    r"|(?<=://)[^/\s\"'<>,@]{1,300}(?=@)"
    r"|(?<=Bearer )[\w.~+/=-]{16,}"
    r"|(?<=[?&])(?:access_token|token|api_key|apikey|key|sig|signature|X-Amz-Signature|X-Amz-Security-Token)=[^&\s\"'<>]+",
)
_NAMED = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|SECRET|PRIVATE)_?KEY)(_|$)|^KEY$", re.I
)
_concealed: set[str] = set()
_LENGTH = 12  # of a value in the environment that is taken for a secret: shorter ones are words
MOST = 299  # characters of a message
_LONG_WORD = re.compile(r"[^\s'\"]{61,}")
LONGEST = 200  # characters of a word that others are compared with


class RecipeError(ValueError):
    """The recipe or the call is wrong. One line: the setting, the value, what to do. The command exits 2.

    Whatever stands in the message, it is one line of less than 300 characters that a terminal can show, without secrets.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class LostError(Exception):
    """Who made a stage is gone: a process was killed, a machine fell out. One line. The command exits 1."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def conceal(secret: str) -> None:
    """Have a secret, whatever it looks like, left out of all that this process says and writes."""
    _concealed.add(secret)


def redacted(text: str) -> str:
    """The text without tokens, keys and passwords, also as JSON and HTML spell them."""
    # A text that is shorter than every value of the environment holds none: reading them takes most of the time.
    known = _concealed | (_of_the_environment() if len(text) >= _LENGTH else set())
    for secret in sorted(known, key=len, reverse=True):  # one may begin with another
        for spelled in _spellings(secret):
            text = text.replace(spelled, HIDDEN)
    return _TOKENS.sub(HIDDEN, text)


def _of_the_environment() -> set[str]:
    """Read each time: a variable may be set later."""
    values = (os.environ.get(name, "").strip() for name in os.environ if _is_of_a_secret(name))
    return {value for value in values if len(value) >= _LENGTH and not value.startswith(("/", "~"))}


@lru_cache(maxsize=1024)
def _is_of_a_secret(name: str) -> bool:
    """Whether a variable of the environment is named like one that holds a secret."""
    return bool(_NAMED.search(name))


@lru_cache(maxsize=64)
def _spellings(secret: str) -> tuple[str, ...]:
    return tuple({secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)})


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known words when none is near, whatever their case and the spaces around them."""
    names = [str(name) for name in known]
    folded = {name.strip().lower(): name for name in reversed(names)}
    short = len(word) <= LONGEST and len(names) <= 10_000  # beyond, comparing takes seconds
    near = [word] if word in names else difflib.get_close_matches(word.strip().lower(), folded, n=1) if short else []
    if near:
        return f"; did you mean {folded.get(near[0], near[0])!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def first_line(error: BaseException) -> str:
    """An error's first line that says something: libraries begin with headings."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)


def is_panic(error: BaseException) -> bool:
    """Whether it is how libraries in Rust say that they cannot go on: no Exception, and of no class that can be imported."""
    return type(error).__name__ == "PanicException"


def one_line(message: str, most: int = MOST) -> str:
    """The message on one line; where it is too long, first long words are cut and then its middle: the setting stands at the start,
    what to do at the end."""
    if len(message) > 20 * most:  # a value of megabytes is not gone through
        message = f"{message[: 10 * most]} {message[-10 * most :]}"
    line = printable(" ".join(message.split()))
    if len(line) > most:  # of a long path the end tells more than of a sentence
        line = _LONG_WORD.sub(lambda word: f"{word[0][:10]}...{word[0][-40:]}", line)
    if len(line) <= most:
        return line
    kept = most - len(" ... ")
    return f"{line[: kept - kept // 2]} ... {line[-(kept // 2) :]}"


def printable(value: object, keep: str = "") -> str:
    """Text of one line: control characters (a terminal obeys them, XML forbids them) become a visible mark.

    Lone surrogates go the same way, since no file can hold them. Directional overrides are taken out: they would
    reorder what stands around the value. `keep` names control characters to leave.
    """
    return "".join(
        character
        if character in keep
        else " "
        if character in "\n\t"
        else "\N{REPLACEMENT CHARACTER}"
        if unprintable(character)
        else character
        for character in redacted(str(value))
        if not is_direction(character)
    )


def unprintable(character: str) -> bool:
    """Whether a terminal obeys it, a file cannot hold it, or it ends a line."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in "\ufffe\uffff"


def is_direction(character: str) -> bool:
    """Whether it turns the direction of writing."""
    return ord(character) in _DIRECTIONS
