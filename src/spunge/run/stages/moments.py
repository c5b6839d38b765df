"""The stages that take second moments of branches, for merge rules that need them."""

from collections.abc import Mapping
from typing import Any

from spunge.run.graph import NotMadeError, Stage
from spunge.run.models import Lineup, Model
from spunge.run.moments import Wanted, moments_cost, moments_inputs, take_moments, wanted_of
from spunge.run.session import Session
from spunge.run.stages.naming import RunGraph, inside, titled


def add_moments(graph: RunGraph, line: Lineup, mark: str) -> None:
    """Each once, however many merges need it."""
    for wanted in (wanted for model in line.models for wanted in wanted_of(model, line)):
        graph.add(_moments(graph, wanted, mark))


def made_from(model: Model, line: Lineup, mark: str) -> tuple[str, ...]:
    """The stages that a model is merged from: its trainings, and what its rule needs of each."""
    moments = (mark + wanted.name for wanted in wanted_of(model, line))
    return (*(mark + training.name for training in model.trainings), *moments)


def _moments(graph: RunGraph, wanted: Wanted, mark: str) -> Stage[Session]:
    others = tuple(mark + training.name for training in wanted.others)

    def inputs() -> Mapping[str, Any]:
        # Which tensors the others changed enters the key, not how: a part more or less takes no moments again.
        if missing := next((name for name in others if not graph.state(name).done), None):
            raise NotMadeError(f"{missing!r} to be made")
        return moments_inputs(wanted)

    rows = min(wanted.settings["rows"], max(len(part.samples) for part in wanted.training.parts))
    return Stage(
        mark + wanted.name,
        titled(f"take moments of {wanted.training.name}", mark),
        needs=("base", mark + wanted.training.name),
        after=others,
        inputs=inputs,
        files=tuple(inside(graph, wanted.files)),
        make=lambda session: take_moments(wanted, session),
        cost=lambda: moments_cost(wanted),
        told=f"second moments of {wanted.kind} on {rows} rows",
    )
