"""A run's folder: whose it is, and that one process works in it at a time."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.files import HELD, LOCK, alone, unwritable
from spunge.recipe.schema import Recipe
from spunge.run.stamps import faults, read_stamp, stamps_in
from spunge.weights.folder import TAUGHT

IDENTITY = ("model.path", "model.revision", "forget.source", "split.by")


def default_folder(recipe: Any) -> Path:
    """runs/NAME, after the recipe's file."""
    stem = Path(str(recipe)).stem if isinstance(recipe, str | Path) else "run"
    return Path("runs") / (stem if stem.strip(". ") else "run")


STAMPS, TRIALS = "stamps", "trials"  # by these folders in it, one is known as a run's, or as a search's
SHOWN = 40  # characters of a value in an error that names several
FAILED = "failed.json"  # in the folder of a trial that gave no scores
OF = {STAMPS: "run", TRIALS: "search"}


def require_own(folder: Path, mark: str = STAMPS) -> None:
    """Raises RecipeError where the folder holds something that no run wrote; no search, with the mark of one."""
    if not folder.exists() or (folder / mark).is_dir() or (mark == STAMPS and (folder / "recipe.yaml").exists()):
        return
    if not folder.is_dir() or any(entry.name not in (LOCK, HELD) for entry in folder.iterdir()):
        raise RecipeError(f"--out: {str(folder)!r} exists and is no {OF[mark]}'s folder; give another")


def runs_in(folder: str | Path) -> list[Path]:
    """The run that a folder is, or the runs of a search. Raises RecipeError where it is neither's."""
    path = Path(folder).resolve()
    if (path / STAMPS).is_dir() or (path / "recipe.yaml").is_file():
        return [path]
    if not (path / TRIALS).is_dir():
        raise RecipeError(
            f"{str(folder)!r} is no run's folder; give the folder of a run (spunge run) or a search (spunge tune)"
        )
    return sorted(stamps.parent for level in ("*", "*/*") for stamps in path.glob(f"{level}/{STAMPS}"))


@contextmanager
def all_alone(folders: Iterable[Path]) -> Iterator[None]:
    """In the block no other process can be at work in any of the folders. Raises RecipeError where one is."""
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(alone(folder))
        yield


@contextmanager
def claimed(folder: Path, mark: str = STAMPS) -> Iterator[None]:
    """Make the folder, or take up a run's (a search's, by its mark). In the block no other process can be in a block of the same.

    Raises RecipeError where it belongs to something else, cannot be written, or another process is at work in it.
    """
    require_own(folder, mark)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
    except OSError as error:
        raise unwritable(folder / "recipe.yaml", error) from error
    with alone(folder):
        if all(entry.name in (LOCK, HELD) for entry in folder.iterdir()):
            (folder / mark).mkdir()  # first of all: by this the folder of what was killed is known
        yield


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two recipes the same run: the model, the forget rows' source and the attribute. The rest may change."""
    return {
        "model.path": recipe.model.path,
        "model.revision": recipe.model.revision,
        "forget.source": [source.path or source.hub for source in recipe.forget.source] if recipe.forget else None,
        "split.by": recipe.split.model_dump(mode="json")["by"] if recipe.split else None,
    }


def refuse_replacing(folder: Path, recipe: Recipe) -> None:
    """Raises RecipeError where finished trainings of another recipe would be made again."""
    if any(folder.glob("branches/*/done.json")) and not (folder / "stamps").is_dir():
        raise RecipeError(
            f"--out: {str(folder)!r} holds a run of an older version, of which nothing can be checked; "
            "give --replace to make it again, or another folder"
        )
    written = read_stamp(folder, "recipe")
    if written is None:
        return
    differing = [
        f"{name} was {before} and is now {after}"
        for name, now in identity(recipe).items()
        if (known := written.inputs.get(name)) != now
        for before, after in [_apart(repr(known), repr(now))]
    ]
    if not differing:
        return
    finished = [
        stamp.stage
        for stamp in stamps_in(folder)
        if {"delta.json", TAUGHT} & {Path(file).name for file in stamp.files}
        and not any(faults(folder, stamp, byproducts=False))
    ]
    if finished:
        more = {0: "", 1: " (another setting differs too)"}.get(
            rest := len(differing) - 1, f" ({rest} more settings differ)"
        )
        trainings = "finished training" if len(finished) == 1 else "finished trainings"
        own = _window(repr(str(folder)), max(0, len(repr(str(folder))) - SHOWN))
        raise RecipeError(
            f"--out: {own} was made by another recipe: {differing[0]}{more}. It holds {len(finished)} {trainings}; "
            "give another folder, or --replace to make again what no longer fits"
        )


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two values where they differ, each short enough to stand in one line with the other."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, min(same - SHOWN // 3, max(len(one), len(other)) - SHOWN))
    return _window(one, start), _window(other, start)


def _window(value: str, start: int) -> str:
    if len(value) <= SHOWN:
        return value
    return f"{'...' * (start > 0)}{value[start : start + SHOWN]}{'...' * (len(value) > start + SHOWN)}"
