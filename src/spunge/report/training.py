"""What each training did, from its delta.json, as lines of a table."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spunge.files import read_json
from spunge.report.wording import MISSING, clean, duration, name, number, size


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
    """Every training below RUN/KIND, in the order of the parts: a folder's name -> what was unlearned there."""
    names = parts if kind == "branches" else {}
    # A control may be several trainings: controls/random/random-1, ...
    files = sorted((run / kind).glob("*/delta.json")) + sorted((run / kind).glob("*/*/delta.json"))
    found = {file.parent.relative_to(run / kind).as_posix(): file.parent for file in files}
    order = [slug for slug in names if slug in found] + [slug for slug in found if slug not in names]
    return [_training(found[slug], names.get(slug, slug)) for slug in order]


def _training(folder: Path, value: str) -> Training:
    info = read_json(folder / "delta.json")
    info = info if isinstance(info, Mapping) else {}
    parts = info.get("parts") or []
    tensors = info.get("tensors") or {}
    weights = folder / "delta.safetensors"
    losses = (f"{clean(term)} {_loss(value)}" for term, value in (info.get("losses") or {}).items())
    notes = (f"{clean(key)} {_loss(value)}" for key, value in (info.get("notes") or {}).items())
    return Training(
        name=name(value),
        rows=clean(sum(part.get("rows", 0) for part in parts)) if parts else MISSING,
        parts=len(parts),
        steps=clean(info.get("steps", MISSING)),
        stopped=clean(info.get("stopped") or ""),
        losses=", ".join(losses) or MISSING,
        seconds=duration(info["seconds"]) if isinstance(info.get("seconds"), int | float) else MISSING,
        notes=", ".join(notes),
        tensors=tuple(map(clean, tensors)),
        entries=f"{sum(math.prod(entry.get('shape') or [0]) for entry in tensors.values()):,}",
        size=size(weights.stat().st_size) if weights.exists() else MISSING,
    )


def _loss(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else clean(value)
