"""Names of stages, and their files, as every kind of stage has them."""

from collections.abc import Sequence
from pathlib import Path

from spunge.run.graph import Graph
from spunge.run.models import Lineup
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
