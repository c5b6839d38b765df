"""How far a run is: each stage done, stale (and which input changed), damaged or missing, with its time and size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.files import shown_size
from spunge.recipe.loading import load_recipe
from spunge.run.stages.building import build


@dataclass(frozen=True)
class StageStatus:
    stage: str
    title: str
    state: str  # done, stale, damaged, missing or unknown
    why: str  # which input changed, or which file is not as it was
    seconds: float | None  # what making it took here
    size: int | None  # bytes of its files
    taken: str  # the run that it was taken from; "": made here

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def status(folder: str | Path) -> list[StageStatus]:
    """The stages of a run's folder. Reads the rows, the base's fingerprint and every file of the run; writes nothing.

    Raises RecipeError where the folder is no run's, or its recipe's data cannot be read.
    """
    folder = Path(folder).resolve()
    graph = build(run_recipe(folder), folder).graph
    listed = []
    for name, stage in graph.stages.items():
        if stage.make is None:
            continue
        state = graph.state(name)
        seconds, size = (state.stamp.seconds, state.stamp.size) if state.stamp else (None, None)
        taken = state.stamp.taken if state.stamp else ""
        listed.append(StageStatus(name, stage.title, state.kind, state.why, seconds, size, taken))
    return listed


def run_recipe(folder: Path) -> Any:
    """The recipe of a run's folder. Raises RecipeError where there is none."""
    return load_recipe(recipe_file(folder))


def recipe_file(folder: Path) -> Path:
    """Where a run's recipe lies, unread. Raises RecipeError where there is none."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{str(folder)!r} holds no recipe.yaml; give the folder of a run (spunge run)")
    return file


def status_rows(stages: Sequence[StageStatus]) -> list[list[str]]:
    """A line a stage, as a person reads it: state, stage, time, size, why."""
    return [
        [
            each.state,
            each.title,
            f"from {each.taken}" if each.taken else "" if each.seconds is None else f"{each.seconds:.1f} s",
            "" if each.size is None else shown_size(each.size),
            each.why,
        ]
        for each in stages
    ]
