"""Names of stages, and their files, as every kind of stage has them."""

from collections.abc import Sequence
from pathlib import Path

from spunge.run.graph import Graph
from spunge.run.models import Lineup, Model
from spunge.run.session import Session

RunGraph = Graph[Session]


def mark_of(number: int, line: Lineup) -> str:
    """What the stages' names of a further seed begin with."""
    return f"seed-{line.inputs.recipe.seed}:" if number else ""


def titled(title: str, mark: str) -> str:
    """A stage's title, with its seed where it is of a further one."""
    return f"{title} ({mark.rstrip(':')})" if mark else title


def inside(graph: RunGraph, files: Sequence[Path]) -> list[str]:
    return [file.relative_to(graph.folder).as_posix() for file in files]


def stage_of(model: Model, mark: str) -> str:
    """The stage that a model is: a training's where it is what that left, and one beside it where that has a scale as well."""
    if model.shared:
        return model.name
    scaled = model.calibration is not None and model.name in {training.name for training in model.trainings}
    return f"{mark}{model.name}/model" if scaled else f"{mark}{model.name}"
