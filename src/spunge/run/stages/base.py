"""The stages of the base: what it is converted and taught from, and what stands beside it."""

from collections.abc import Callable, Mapping
from typing import Any

from spunge.results import UNTAUGHT
from spunge.run.costs import (
    conversion_cost,
    teaching_cost,
    teaching_steps,
)
from spunge.run.graph import NotMadeError, Stage
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.merge import convert_base
from spunge.run.session import Session
from spunge.run.stages.naming import RunGraph, inside
from spunge.run.teach import RETRAIN, TEACH, Teaching, make_taught, teaching_inputs, teachings
from spunge.run.train import STATES


def add_base(graph: RunGraph, inputs: SeedInputs) -> None:
    """The base itself, nothing to make but for pickled or quantised weights, which are converted, and for what is taught; and what
    stands beside it."""
    base = inputs.base
    needs: tuple[str, ...] = ()
    if base.local and base.conversion is not None:
        needs = ("conversion",)
        graph.add(
            Stage(
                "conversion",
                "convert the base",
                inputs=lambda: {"files": base.unconverted},
                files=("base/**",),
                cost=lambda: conversion_cost(base),
                make=lambda session: convert_base(base),
            )
        )
    if taught := teachings(inputs):
        graph.add(_given_model(graph, UNTAUGHT, needs, lambda: base.key_of(base.untaught)))
        needs = (TEACH,)
    for teaching in taught:
        graph.add(_teaching(graph, teaching, base))
    graph.add(_given_model(graph, "base", needs, lambda: base.key))
    if (asked := inputs.recipe.reference) is not None and asked.path is None:
        name = f"reference:{asked.name}"
        graph.add(_given_model(graph, name, (RETRAIN,), lambda: base.key_of(base.retrained)))


def _given_model(graph: RunGraph, name: str, needs: tuple[str, ...], key: Callable[[], str]) -> Stage[Session]:
    """A model that training and judging begin from, known by its content. needs: the stage that makes its files, if any."""

    def inputs() -> Mapping[str, Any]:
        for need in needs:
            if not graph.state(need).done:
                raise NotMadeError(f"{need!r} to be made")
        return {"base": key()}

    return Stage(name, f"the {name} model" if name != "base" else "the base", needs=needs, inputs=inputs)


def _teaching(graph: RunGraph, teaching: Teaching, base: BaseInputs) -> Stage[Session]:
    return Stage(
        teaching.name,
        "teach the base" if teaching.name == TEACH else "teach the reference",
        needs=(UNTAUGHT,),
        inputs=lambda: teaching_inputs(teaching, base),
        files=tuple(inside(graph, [teaching.folder / "**"])),
        passing=tuple(inside(graph, [teaching.work / STATES, teaching.work / "delta"])),
        make=lambda session: make_taught(teaching, base, graph.key(teaching.name), session),
        cost=lambda: teaching_cost(teaching, base),
        together=True,
        told=f"teach {len(teaching.samples)} rows ({teaching_steps(teaching)} steps)",
    )
