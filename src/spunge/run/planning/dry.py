"""A few steps of a recipe's first training on the real model, in a process of its own: what they take, and nothing is written."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import RecipeError, one_line
from spunge.recipe.loading import dump_recipe
from spunge.recipe.schema import Recipe
from spunge.run.planning.estimate import Estimator
from spunge.run.planning.steps import Steps
from spunge.temporary import TemporaryFolder

STEPS = 4  # the first is to warm up


class Measured(NamedTuple):
    """What steps of a training took."""

    steps: int
    seconds: float  # of a step
    processor: float  # processor seconds of a step
    memory: int  # bytes at the peak: of the GPU, or of the process


def dry_steps(recipe: Recipe, steps: int = STEPS) -> Measured:
    """Take steps of the first training of a recipe. Raises RecipeError where they cannot be taken."""
    with TemporaryFolder("recipe") as folder:
        file = folder / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "spunge.run.planning.dry", str(file), str(steps), str(os.getpid())]
        made = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very Python
    if made.returncode:
        last = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
        raise RecipeError(f"--measure: the steps could not be taken: {one_line(last)}")
    return Measured(**json.loads(made.stdout.splitlines()[-1]))


def scaled(size: Estimator, recipe: Recipe, steps: Steps, told: str) -> Estimator:
    """What is planned, times what some steps of a training took over what is planned for them."""
    measured = dry_steps(recipe)
    planned = size.altered(processes=1).training(replace(steps, count=measured.steps))  # one process takes the steps
    a_step = planned.seconds / measured.steps
    found = size.altered(slower=measured.seconds / a_step, larger=measured.memory / planned.memory)
    found.notes.add(
        f"measured: {measured.steps} steps of {told}: {measured.seconds:.2f} s each, where {a_step:.2f} s were planned, and "
        f"{measured.memory / 2**30:.2f} GiB, where {planned.memory / 2**30:.2f} were; all is scaled by that"
    )
    return found


def _take(recipe: Recipe, steps: int, folder: Path) -> Measured:
    import torch

    from spunge.model.memory import peak_memory
    from spunge.progress import Silent
    from spunge.registry import METHODS
    from spunge.run.session import Session
    from spunge.run.stages.building import lineups
    from spunge.run.train import asking_of, base_for
    from spunge.unlearning.method import Task

    line = lineups(recipe, folder)[0]
    unlearn: Any = line.inputs.unlearn.model_copy(update={"steps": steps, "epochs": None, "joint_steps": None})
    if (asking := asking_of(unlearn)) is not None:
        unlearn = asking.settled(unlearn, {}, {})  # what others would answer changes no step's work
    session = Session(line.inputs.base, Silent())
    base = base_for(unlearn, line.inputs, session)
    marks: list[tuple[float, float]] = []

    def mark(step: int = 1, _of: int = 0, _said: str = "", /) -> None:
        if step == 0:  # of what is done before the steps
            return
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append((time.perf_counter(), time.process_time()))

    parts = {part.value: part.samples for part in line.trainings[0].parts}
    task = Task(
        base, parts, line.inputs.retain, dict.fromkeys(parts, 0), progress=mark, kept={}, decouple=line.inputs.decouple
    )
    mark()
    METHODS.get(unlearn.method).unlearn(task, unlearn)
    first = 1 if len(marks) > 2 else 0  # the first step also sets up
    seconds, processor = ((marks[-1][at] - marks[first][at]) / (len(marks) - 1 - first) for at in (0, 1))
    memory = torch.cuda.max_memory_reserved() if base.device.type == "cuda" else peak_memory()
    return Measured(len(marks) - 1, seconds, processor, memory)


def main() -> None:
    from spunge.recipe.loading import load_recipe
    from spunge.run.executors.worker import die_with

    die_with(int(sys.argv[3]))  # a model in memory for a plan that nobody reads any more
    with TemporaryFolder("steps") as folder:
        print(json.dumps(_take(load_recipe(sys.argv[1]), int(sys.argv[2]), folder)._asdict()))


if __name__ == "__main__":
    main()
