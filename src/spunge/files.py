"""Files and folders that appear whole or not at all, and the hash that says whether they are still the right ones."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from spunge.errors import RecipeError

CHECK = "check"  # the key of a sealed value's own checksum


def fingerprint(value: Any) -> str:
    """sha256 of a value's canonical JSON: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


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
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None


def cache_folder() -> Path:
    """What is kept across runs: the folder that SPUNGE_CACHE names, by default spunge in the user's cache folder."""
    given = os.environ.get("SPUNGE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spunge"


def checksum(file: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, read in pieces. It tells damage, not forgery."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a checksum of itself, so that a file that holds it vouches for itself."""
    return {**value, CHECK: xxhash.xxh3_64_hexdigest(_canonical(value))}


def unsealed(value: Any) -> dict[str, Any] | None:
    """What was sealed; None for anything else, and for what was changed since."""
    if not isinstance(value, dict) or CHECK not in value:
        return None
    content = {key: inner for key, inner in value.items() if key != CHECK}
    return content if value[CHECK] == xxhash.xxh3_64_hexdigest(_canonical(content)) else None


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def unwritable(file: Path, error: OSError) -> RecipeError:
    """The one-line error for a disk that is full or a folder that cannot be written."""
    if error.errno == errno.ENOSPC:
        return RecipeError(
            f"--out: the disk that holds {str(file.parent)!r} is full; free some space or give another folder"
        )
    return RecipeError(f"--out: cannot write {str(file)!r} ({error.strerror}); give another folder")
