"""The stages that judge: every evaluation of every model."""

from collections.abc import Sequence
from pathlib import Path

from spunge.recipe.evaluating import measured_again
from spunge.run.costs import (
    judging_cost,
)
from spunge.run.graph import Stage
from spunge.run.judge import Judging, compared, evaluation_folder, judge, judging_inputs, model_key, shown
from spunge.run.models import Lineup
from spunge.run.session import Session
from spunge.run.stages.naming import RunGraph, inside, stage_of, titled


def add_judgings(graph: RunGraph, line: Lineup, mark: str, base_folder: Path) -> list[Judging]:
    """Every evaluation of every model. The base, and what stands beside it, is judged with the first seed alone."""
    judgings: list[Judging] = []
    for model in line.models:
        if model.shared and mark:
            continue
        # What is measured again under an attack is measured without one first.
        for items in sorted(
            line.inputs.base.judged_at(model.name), key=lambda each: measured_again(each.settings) is not None
        ):
            folder = evaluation_folder(line.folder, model.name)
            judging = Judging(model, items, line, folder, base_folder)
            before = [judging_name(other, mark) for other in judgings[-1:] if other.folder == folder]
            judgings.append(judging)
            graph.add(_judging(graph, judging, mark, before))
    return judgings


def judging_name(judging: Judging, mark: str = "") -> str:
    """`judge:merged/3f0a12...`: an evaluation may be called anything, its file may not."""
    return f"{mark}judge:{judging.model.name}/{judging.file.stem}"


def _judging(graph: RunGraph, judging: Judging, mark: str, before: Sequence[str]) -> Stage[Session]:
    """before: the model's judging before this one. They share its texts, and the one that comes first makes them."""
    name = judging_name(judging, mark)
    model = stage_of(judging.model, mark)
    # The base's texts are there for those who compare with them.
    base = f"judge:base/{judging.file.stem}"
    # Of a model that nothing was made into from the base, only this depends on it.
    beside = ("base",) if judging.model.shared and model != "base" and compared(judging) else ()
    expert = (mark + judging.model.expert.name,) if judging.model.expert is not None else ()
    return Stage(
        name,
        titled(f"judge {judging.model.name}: {judging.items.name}", mark),
        needs=(model, *beside, *expert),
        after=(*before, *([base] if base in graph.stages and base != name else [])),
        inputs=lambda: judging_inputs(judging),
        files=tuple(inside(graph, [judging.file])),
        make=lambda session: judge(
            judging, graph.key(name), model_key(judging, *(graph.key(each) for each in (model, *expert))), session
        ),
        cost=lambda: judging_cost(judging),
        told=judging.items.name,
        shown=lambda session: shown(judging, session),
    )
