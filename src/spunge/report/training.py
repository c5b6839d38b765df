"""What each training did, from its delta.json, as lines of a table."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import printable
from spunge.report.reading import shown
from spunge.report.wording import MISSING, duration, name, number, size

TAUGHT = {"the base": "taught", "the retrained reference": "reference"}  # what is shown -> its folder


class Training(NamedTuple):
    """One branch or control, or what was taught; text that is ready to be shown."""

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


def trained(folder: Path, names: Mapping[str, str]) -> list[Training]:
    """The trainings below RUN/branches or RUN/controls, in the order of `names`: a folder's name -> what is shown for it.

    A folder that is not named is what an earlier recipe left, and is passed over. Raises RecipeError where a delta.json is
    damaged.
    """
    trainings: list[Training] = []
    for slug, shown_as in names.items():
        if (folder / slug / "delta.json").exists():
            trainings.append(_read(folder / slug, shown_as))
        # A control may be several trainings: controls/random/random-1, ...
        trainings += [
            _read(file.parent, f"{slug}/{file.parent.name}") for file in sorted((folder / slug).glob("*/delta.json"))
        ]
    return trainings


def taught(run: Path) -> list[Training]:
    """The models that the run taught, as lines of the same table; their size is that of the checkpoint."""
    trainings: list[Training] = []
    for value, folder in TAUGHT.items():
        nbytes = size(sum(file.stat().st_size for file in (run / folder).glob("*.safetensors")))
        line = shown(run / folder / "teaching.json", partial(_lesson, value=value, nbytes=nbytes), None)
        trainings += [line] if line else []
    return trainings


def _lesson(info: Mapping[str, Any], value: str, nbytes: str) -> Training:
    return _training({**info, "parts": [{"rows": info.get("rows", 0)}]}, value, nbytes)


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
        steps=_steps(info),
        stopped=printable(info.get("stopped") or ""),
        losses=", ".join(losses) or MISSING,
        seconds=duration(info["seconds"]) if info.get("seconds") is not None else MISSING,
        notes=", ".join(notes),
        tensors=tuple(map(printable, tensors)),
        entries=f"{sum(math.prod(entry.get('shape') or [0]) for entry in tensors.values()):,}",
        size=nbytes,
    )


def _steps(info: Mapping[str, Any]) -> str:
    """How many, and of how many where the best step was saved."""
    watched = info.get("watched") or {}
    of = f" of {watched.get('trained', MISSING)}" if watched.get("keep") == "best" else ""
    return printable(f"{info.get('steps', MISSING)}{of}")


def _loss(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else printable(value)
