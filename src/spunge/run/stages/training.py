"""The stages that train: a branch of each part, and what controls train."""

from collections.abc import Mapping
from typing import Any

from spunge.registry import METHODS
from spunge.run.costs import (
    measurements,
    settling_cost,
    training_cost,
    training_steps,
)
from spunge.run.graph import NotMadeError, Stage
from spunge.run.models import Lineup, Training
from spunge.run.session import Session
from spunge.run.stages.naming import RunGraph, inside, titled
from spunge.run.train import (
    SETTLED,
    STATES,
    answer_files,
    ask,
    asking_inputs,
    asking_of,
    settle,
    settle_inputs,
    train,
    training_inputs,
    undecided,
)
from spunge.run.watching import watching_folder


def add_asking(graph: RunGraph, line: Lineup, mark: str) -> None:
    """What the method asks of others. It comes first, since it takes no model and may fail."""
    if not line.trainings or (asking := asking_of(line.inputs.unlearn)) is None:
        return
    graph.add(
        Stage(
            f"{mark}{asking.name}",
            titled(f"ask for {asking.name}", mark),
            inputs=lambda: asking_inputs(line, asking),
            files=tuple(inside(graph, answer_files(line, asking))),
            make=lambda session: ask(line, asking, session),
            light=True,
        )
    )


def add_trainings(graph: RunGraph, line: Lineup, mark: str) -> None:
    if not line.trainings:
        return
    unlearn = line.inputs.unlearn
    settled = f"{mark}settled"
    if names := undecided(unlearn):
        graph.add(
            Stage(
                settled,
                titled(f"choose unlearn.{', '.join(names)}", mark),
                needs=("base",),
                inputs=lambda: settle_inputs(line.inputs, unlearn),
                files=tuple(inside(graph, [line.folder / SETTLED])),
                make=lambda session: settle(line, session),
                cost=lambda: settling_cost(line),
            )
        )
    for training in line.trainings:
        graph.add(_training(graph, line, training, mark, settled if names else None))


def _training(graph: RunGraph, line: Lineup, training: Training, mark: str, settled: str | None) -> Stage[Session]:
    name = mark + training.name

    asking = asking_of(line.inputs.unlearn)
    asked = f"{mark}{asking.name}" if asking else None

    def inputs() -> Mapping[str, Any]:
        if asked is not None and not graph.state(asked).done:
            raise NotMadeError(f"{asked} to be asked for")
        # The choice itself enters the key, not what it was made from: one that is made again may turn out otherwise.
        if settled is not None and not graph.state(settled).done:
            raise NotMadeError(f"unlearn.{', unlearn.'.join(undecided(line.inputs.unlearn))} to be chosen")
        return training_inputs(training, line)

    needs = ("base", *([mark + training.after.name] if training.after else []))
    return Stage(
        name,
        titled(f"unlearn {training.name}", mark),
        needs=needs,
        after=tuple(filter(None, (settled, asked))),
        inputs=inputs,
        files=tuple(inside(graph, [training.folder / "delta.safetensors", training.folder / "delta.json"])),
        passing=tuple(inside(graph, [training.folder / STATES, watching_folder(training, line)])),
        make=lambda session: train(training, line, graph.key(name), session),
        cost=lambda: training_cost(training, line),
        together=METHODS.get(line.inputs.unlearn.method).shares,
        told=_told(training, line),
    )


def _told(training: Training, line: Lineup) -> str:
    """For a plan: what is unlearned, in how many steps, and how often it is measured."""
    watched = f", measured {count} times" if (count := measurements(training, line)) else ""
    rate = "".join(f", learning rate {value:g}" for name, value in training.own if name == "learning_rate")
    parts = ", ".join(part.value for part in training.parts)
    return f"unlearn {parts} ({training_steps(training, line)} steps{rate}{watched})"
