"""Files and folders that appear whole or not at all, and the hash that says whether they are still the right ones."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError

DONE = "done.json"


def cache_folder() -> Path:
    """Where rows and scores are kept across runs: SPUNGE_CACHE, by default in the user's cache folder."""
    given = os.environ.get("SPUNGE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spunge"


def fingerprint(value: Any) -> str:
    """sha256 of a value's canonical JSON: equal for equal content, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write aside, then rename. Raises RecipeError when the folder cannot be written or the disk is full."""
    aside = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise unwritable(file, error) from error


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends, and vanishes when it fails.

    `folder` must be absent or empty. Raises RecipeError when the disk cannot take it.
    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_json(file: Path) -> Any:
    """The file's value, or None where there is no such file or it is cut short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def mark_done(folder: Path, key: str) -> None:
    """Say that the folder is complete and what it was made from. Written last."""
    write_json(folder / DONE, {"fingerprint": key})


def is_done(folder: Path, key: str) -> bool:
    done = read_json(folder / DONE)
    return isinstance(done, dict) and done.get("fingerprint") == key


def unwritable(file: Path, error: OSError) -> RecipeError:
    """The one-line error for a disk that is full or a folder that cannot be written."""
    if error.errno == errno.ENOSPC:
        return RecipeError(
            f"--out: the disk that holds {str(file.parent)!r} is full; free some space or give another folder"
        )
    return RecipeError(f"--out: cannot write {str(file)!r} ({error.strerror}); give another folder")
