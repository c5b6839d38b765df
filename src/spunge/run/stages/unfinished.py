"""What of a run is still to be made, and what would be made again."""

from collections.abc import Iterator

from spunge.errors import RecipeError
from spunge.files import read_json
from spunge.registry import METHODS
from spunge.run.judge import Judging
from spunge.run.models import Lineup
from spunge.run.stages.building import Run
from spunge.run.stages.judging import judging_name
from spunge.run.stages.naming import mark_of
from spunge.run.stamps import Stamp
from spunge.run.teach import Teaching, teachings
from spunge.run.watching import measured_otherwise


def refuse_losing(run: Run) -> None:
    """Raises RecipeError where finished trainings no longer fit the recipe, its rows or the base, and would be made again."""
    if lost := losing(run):
        raise RecipeError(
            f"--out: {str(run.graph.folder)!r} holds finished trainings that no longer fit ({lost}); give --replace to train "
            "them again, or another folder"
        )


def _trained(stamp: Stamp) -> bool:
    """Whether training went into what a stamp vouches for; what another tool made is taken again at no cost."""
    name = stamp.inputs.get("unlearn.method")
    return name not in METHODS.names() or METHODS.get(name).trains


def losing(run: Run) -> str:
    """Which finished trainings would be made again, and why; empty where none would."""
    stages = [teaching.name for teaching in teachings(run.seeds[0].inputs)] + [
        mark_of(number, line) + training.name for number, line in enumerate(run.seeds) for training in line.trainings
    ]
    states = {name: run.graph.state(name) for name in stages}
    lost = [
        f"{name}: {state.why}"
        for name, state in states.items()
        if state.kind == "stale" and state.stamp and _trained(state.stamp) and not run.graph.faults(state.stamp)
    ]
    return f"{lost[0]}{f', and {len(lost) - 1} more' if len(lost) > 1 else ''}" if lost else ""


def untrained(run: Run) -> list[Lineup]:
    """The seeds of which some training is still to be made."""
    return [
        line
        for number, line in enumerate(run.seeds)
        if any(not run.graph.state(mark_of(number, line) + training.name).done for training in line.trainings)
    ]


def unwatched(run: Run) -> Iterator[str]:
    """Remarks where finished trainings have no curve, or that of something else: to be watched is no reason to train again."""
    finished = [
        (training, line.inputs, (read_json(training.folder / "delta.json") or {}).get("watched"))
        for number, line in enumerate(run.seeds)
        for training in line.trainings
        if run.recipe.watch is not None and run.graph.state(mark_of(number, line) + training.name).done
    ]
    if count := sum(watched is None for _, _, watched in finished):
        many = count > 1
        yield f"watch: {count} finished training{'s were' if many else ' was'} not watched: no curve of {'them' if many else 'it'}"
    others = [
        training.name
        for training, inputs, watched in finished
        if watched is not None and measured_otherwise(training, inputs, watched)
    ]
    if count := len(others):
        many = count > 1
        yield (
            f"watch: {count} finished training{'s were' if many else ' was'} measured otherwise: the curve{'s' if many else ''} of "
            f"{'them are' if many else 'it is'} what the recipe asked for then"
        )


def untaught(run: Run) -> list[Teaching]:
    """The teachings that are still to be made."""
    return [teaching for teaching in teachings(run.seeds[0].inputs) if not run.graph.state(teaching.name).done]


def unjudged(run: Run) -> list[Judging]:
    """The judgings that are still to be made, of all seeds."""
    return [
        judging
        for number, (line, judgings) in enumerate(zip(run.seeds, run.judgings, strict=True))
        for judging in judgings
        if not run.graph.state(judging_name(judging, mark_of(number, line))).done
    ]
