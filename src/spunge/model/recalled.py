"""What was found out about a model's shapes or about this machine, kept from one command to the next (`SPUNGE_CACHE/shapes`).

What it depends on is its name: what is asked, the versions of the libraries and this package's own source.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from spunge.errors import RecipeError
from spunge.files import cache_folder, fingerprint, read_json, sealed, unsealed, write_json

JsonT = TypeVar("JsonT")
DAYS = 30.0
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes")


def recalled(about: object, find: Callable[[], JsonT], days: float = DAYS) -> JsonT:
    """What `find` gives, or gave for the same less than so many days ago. A value of JSON; None is found anew each time.

    about: all that it depends on beside code; it is written as JSON, and what JSON has no form for as str. Where the cache cannot
    be written, nothing is kept.
    """
    file = cache_folder() / "shapes" / f"{fingerprint([about, _code()])}.json"
    with contextlib.suppress(OSError):
        if 0 <= time.time() - file.stat().st_mtime < days * 86400 and (kept := unsealed(read_json(file))) is not None:
            value: JsonT = kept["value"]
            return value
    value = find()
    if value is not None:
        with contextlib.suppress(OSError, RecipeError):
            write_json(file, sealed({"value": value}))
            _tidy(file.parent)
    return value


@cache
def _code() -> list[str]:
    """The versions, and a hash of this package's files: what was found by other code is found again."""
    root = Path(__file__).parent.parent
    sources = [[str(file.relative_to(root)), file.read_bytes().hex()] for file in sorted(root.rglob("*.py"))]
    return [sys.version, *(f"{name} {_version(name)}" for name in LIBRARIES), fingerprint(sources)]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _tidy(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.stat().st_mtime < time.time() - DAYS * 86400:
            Path(entry.path).unlink(missing_ok=True)
