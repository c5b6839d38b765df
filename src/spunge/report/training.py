"""What each training did, from its delta.json, as lines of a table."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import printable
from spunge.report.reading import shown
from spunge.report.wording import MISSING, duration, name, number, size


class Training(NamedTuple):
    """One branch or control; text that is ready to be shown."""

    name: str
    rows: str
    parts: int
    steps: str
    stopped: str
    losses: str
    seconds: str
    notes: str  # what the method itself had to say
    tensors: tuple[str, ...]
    entries: str  # numbers that may differ from the base
    size: str


def trained(run: Path, kind: str, parts: Mapping[str, str]) -> list[Training]:
    """Every training below RUN/KIND, in the order of the parts: a folder's name -> what was unlearned there.

    Raises RecipeError where a delta.json is damaged.
    """
    names = parts if kind == "branches" else {}
    # A control may be several trainings: controls/random/random-1, ...
    files = sorted((run / kind).glob("*/delta.json")) + sorted((run / kind).glob("*/*/delta.json"))
    folders = {file.parent.relative_to(run / kind).as_posix(): file.parent for file in files}
    order = [slug for slug in names if slug in folders] + [slug for slug in folders if slug not in names]
    return [_read(folders[slug], names.get(slug, slug)) for slug in order]


def _read(folder: Path, value: str) -> Training:
    weights = folder / "delta.safetensors"
    nbytes = size(weights.stat().st_size) if weights.exists() else MISSING
    told = shown(folder / "delta.json", lambda info: _training(info, value, nbytes), None)
    return told or _training({}, value, nbytes)


def _training(info: Mapping[str, Any], value: str, nbytes: str) -> Training:
    parts = info.get("parts") or []
    tensors = info.get("tensors") or {}
    losses = (f"{printable(term)} {_loss(mean)}" for term, mean in (info.get("losses") or {}).items())
    notes = (f"{printable(key)} {_loss(note)}" for key, note in (info.get("notes") or {}).items())
    return Training(
        name=name(value),
        rows=str(sum(part.get("rows", 0) for part in parts)) if parts else MISSING,
        parts=len(parts),
        steps=printable(info.get("steps", MISSING)),
        stopped=printable(info.get("stopped") or ""),
        losses=", ".join(losses) or MISSING,
        seconds=duration(info["seconds"]) if info.get("seconds") is not None else MISSING,
        notes=", ".join(notes),
        tensors=tuple(map(printable, tensors)),
        entries=f"{sum(math.prod(entry.get('shape') or [0]) for entry in tensors.values()):,}",
        size=nbytes,
    )


def _loss(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else printable(value)
