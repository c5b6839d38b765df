"""What a search keeps beside its runs, and what of it can be believed: what the search is of, and Optuna's journal.

    OUT/search.json       ranges, objectives, rows, seed; and a checksum of the journal as far as it was vouched for; sealed
    OUT/trials.journal    a line each for what Optuna was told

A journal that was damaged is begun anew. That costs nothing: the same seed draws the same trials, whose stages are there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from spunge.errors import RecipeError
from spunge.files import parse_json, read_json, sealed, unsealed, write_json, written
from spunge.progress import Watcher
from spunge.results import json_value
from spunge.run.stamps import faults, read_stamp

ABOUT, JOURNAL = "search.json", "trials.journal"
_MARK = "journal"


def refuse_other(folder: Path, about: Mapping[str, Any]) -> None:
    """Raises RecipeError where the folder holds a search of other things: trials of both would not be comparable."""
    file = folder / ABOUT
    if not file.exists():
        write_json(file, sealed({**about, _MARK: _mark(b"")}))
        return
    before = unsealed(read_json(file))
    if before is None:
        raise RecipeError(
            f"--out: {str(file)!r} is damaged, and nothing else tells which search this is; give another folder, or take the file "
            "away where you know that it is this one"
        )
    # What an older version did not note is not known to differ.
    differing = [name for name, value in about.items() if name in before and before[name] != json_value(value)]
    if differing:
        raise RecipeError(
            f"--out: {str(folder)!r} holds a search of other {differing[0]}, which cannot be compared with this one; give "
            "another folder"
        )


def vouch(folder: Path) -> None:
    """Vouch for the journal as it is."""
    about = unsealed(read_json(folder / ABOUT))
    if about is not None:
        write_json(folder / ABOUT, sealed({**about, _MARK: _mark((folder / JOURNAL).read_bytes())}))


def mend_journal(folder: Path, watcher: Watcher) -> None:
    """Leave whole lines: a process that was killed may have left half of one. Where it is not as it was, leave no journal."""
    file, about = folder / JOURNAL, unsealed(read_json(folder / ABOUT)) or {}
    content = file.read_bytes() if file.is_file() else b""
    size = about[_MARK]["size"]
    if _mark(content[:size]) != about[_MARK] or not all(map(_is_json, content[size:].split(b"\n")[:-1])):
        watcher.begin(JOURNAL)
        watcher.end("is not as it was written: trials are drawn anew, and what is there of them is taken")
        if file.is_file():
            file.unlink()
        write_json(folder / ABOUT, sealed({**about, _MARK: _mark(b"")}))
    elif not content.endswith(b"\n") and content:
        with written(file) as part:
            part.write_bytes(content[: content.rfind(b"\n") + 1])


def is_whole(run: Path) -> bool:
    """Whether a run's results are those that were written."""
    stamp = read_stamp(run, "results")
    return stamp is not None and not any(faults(run, stamp, byproducts=False))


def _mark(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
