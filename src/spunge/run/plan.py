"""What a run would do, what is done already, and what it would take on a device, without loading weights.

Steps are followed on the model's shapes and the rows' lengths (`spunge.run.planning`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.files import shown_size
from spunge.model.loading import pick_device
from spunge.recipe.loading import load_recipe
from spunge.recipe.schema import Recipe, can_be_spread
from spunge.registry import EXECUTORS
from spunge.report.wording import aligned
from spunge.run.decoding import refuse_other_tokens
from spunge.run.executors.sharded import refuse_unshared
from spunge.run.folder import default_folder, require_own
from spunge.run.graph import Cost
from spunge.run.media import refuse_media
from spunge.run.pipeline import refuse_wrong
from spunge.run.planning.assembling import estimator_of
from spunge.run.planning.devices import CARDS, USABLE, Device, device_of, shared
from spunge.run.planning.dry import scaled
from spunge.run.planning.estimate import Estimator, floor_of
from spunge.run.planning.fitting import Fit, unfit, unjudged
from spunge.run.planning.unweighted import with_shapes
from spunge.run.stages.building import Run, build
from spunge.run.stages.naming import RunGraph
from spunge.run.stages.unfinished import losing
from spunge.run.teach import RETRAIN, TEACH
from spunge.run.train import asking_of, parts_of
from spunge.run.turns import Turn, held_together, turns


@dataclass(frozen=True)
class Step:
    """A stage of the plan."""

    stage: str
    work: str
    done: bool
    seconds: float | None  # None where the model is not here yet
    memory: int | None  # bytes at its peak: of the GPU's memory, or of the machine's where there is none
    disk: int | None  # bytes that its files take


@dataclass(frozen=True)
class Plan:
    folder: str
    device: str
    device_memory: int  # bytes that a process has of it
    stages: list[Step]
    memory: int | None  # bytes of the stage that takes most
    disk: int | None  # bytes that the run's folder takes
    seconds: float | None  # of what is not done yet, one stage after the other
    at_once: int  # stages that are made at once, at the most
    together: int | None  # bytes of one device that its processes hold together (`execution: {kind: processes}`)
    first: list[str]  # those that are made at once first
    elapsed: float | None  # seconds of what is not done yet, with so many at once
    refused: list[str]  # what does not fit into the device's memory, and the setting that would make it fit
    notes: list[str]  # code that the recipe lets run; on the rows: what is left out; on the folder: what a run refuses

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    device: str = "auto",
    measure: bool = False,
) -> Plan:
    """Read and split the rows, look at the run's folder and the model's headers, and estimate. Writes nothing.

    device: auto (the one at hand), cpu, or a card's name (`spunge.run.planning.devices`). measure: take a few steps of the first
    training on the real model, in a process of its own, and scale what is planned by them. Raises RecipeError as a run would; what
    does not fit is told in `refused`.
    """
    folder = Path(out or default_folder(recipe)).resolve()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    require_own(folder)
    with with_shapes(recipe) as shaped:
        if shaped is None:
            return _planned(recipe, folder, device, measure, refuse_wrong)
        if measure:
            raise RecipeError(f"--measure: {recipe.model.path!r} holds no weights; download the model, or leave it out")
        # Nothing that lies in the run's folder was made of a model without values.
        planned = _planned(
            shaped, folder / "unmade", device, measure, lambda begun: refuse_media(begun.seeds[0].inputs)
        )
        told = (
            f"model.path: {recipe.model.path!r} holds no weights: planned by the shapes of its config.json, as if nothing were "
            "done yet"
        )
        notes = [note.replace(shaped.model.path, recipe.model.path) for note in planned.notes]
        return replace(planned, folder=str(folder), notes=[*notes, told])


def _planned(
    recipe: Recipe, folder: Path, device: str, measure: bool, refuse: Callable[[Run], Sequence[str] | None]
) -> Plan:
    executor, settings = EXECUTORS.get(recipe.execution.kind), recipe.execution
    at_once, together = executor.planned(recipe, elsewhere=device in CARDS)
    begun = build(recipe, folder)
    base, graph = begun.base, begun.graph
    here = base.local and (base.conversion is None or graph.state("conversion").done)
    here = here and (recipe.decode is None or base.large_here)
    if here:  # before the machine is measured
        refuse_other_tokens(base)
        refuse(begun)
    where = device_of(device, pick_device(recipe.model.device), anew=measure)
    on_one = _on_one(recipe, 1 if where.gpu else together)
    where = shared(where, on_one)
    size = estimator_of(base, where, together) if here else None
    if measure:
        size = _measured(begun, size, device)
    steps = list(_steps(graph, size))
    taken = turns(graph, _to_make(graph, size), at_once)
    crowded = _crowded(recipe, where, on_one)
    unfitting = list(_unfitting(recipe, graph, size)) if size and not crowded else []
    return Plan(
        folder=str(folder),
        device=where.name,
        device_memory=where.memory,
        stages=steps,
        memory=max((step.memory or 0 for step in steps), default=0) if size else None,
        disk=round(sum(stage.takes.kept for stage in graph.stages.values())) if size else None,
        seconds=round(sum(step.seconds or 0 for step in steps if not step.done), 1) if size else None,
        at_once=at_once,
        together=round(_together(graph, size, taken, at_once, on_one))
        if size and settings.kind == "processes"
        else None,
        first=[turn.stage for turn in taken if turn.start == 0.0],
        elapsed=round(max((turn.end for turn in taken), default=0.0), 1) if size else None,
        refused=[*crowded, *(fit.line for fit in unfitting if fit.refused)],
        notes=[
            *trusted(recipe),
            *_sent(begun),
            *begun.seeds[0].inputs.notes,
            *(fit.line for fit in unfitting if not fit.refused),
            *_replaced(begun, here),
            *(sorted(size.notes) if size else ()),
        ],
    )


def _measured(begun: Run, size: Estimator | None, device: str) -> Estimator:
    """Scaled by some steps of the first training."""
    at_hand = pick_device(begun.recipe.model.device).type
    if device not in ("auto", at_hand):
        raise RecipeError(
            f"--measure: steps are taken on the device at hand ({at_hand}), which is not {device!r}; leave one out"
        )
    if size is None:
        raise RecipeError(
            "--measure: the model is still to be downloaded or converted; run it first, or leave --measure out"
        )
    for name, stage in begun.graph.stages.items():
        if name.startswith(("branch:", "control:")) and (steps := stage.takes.steps) is not None:
            return scaled(size, begun.recipe, steps, name)
    raise RecipeError("--measure: nothing is trained by this recipe; leave it out")


def _together(graph: RunGraph, size: Estimator, taken: Sequence[Turn], at_once: int, on_one: int) -> float:
    """Bytes of a device that its processes hold together, those that help with judging included."""
    memory = {turn.stage: size.stage(graph.stages[turn.stage].takes).memory for turn in taken}
    on_each = at_once if not size.device.gpu else min(at_once, on_one)
    return held_together(graph, taken, memory, at_once) * on_each / max(1, at_once)


def _on_one(recipe: Recipe, together: int) -> int:
    """Processes that share a device. together: of those that train one model."""
    return int(dict(recipe.execution).get("per_device", 1)) * together


def _crowded(recipe: Recipe, share: Device, processes: int) -> list[str]:
    """A line where a process's share of a device does not even hold the libraries. share: the device as a process has it."""
    if processes == 1 or USABLE * share.memory >= (floor := floor_of(share)):
        return []
    whole, setting = share.memory * processes, "per_device" if recipe.execution.kind == "processes" else "processes"
    most = max(1, int(USABLE * whole / floor))
    return [
        f"execution.{setting}: {processes} processes share the {shown_size(whole)} of {share.name}, and each takes "
        f"{shown_size(round(floor))} before there is a model; give {most} at the most"
    ]


def _shares(recipe: Recipe) -> bool:
    """Whether several devices can train a recipe's models together."""
    try:
        refuse_unshared(recipe)
    except RecipeError:
        return False
    return True


def _unfitting(recipe: Recipe, graph: RunGraph, size: Estimator) -> Iterator[Fit]:
    """What does not fit; of several stages that need the same mend, the first, which says how many more there are."""
    told: dict[str, list[Fit]] = {}
    shares, spreads = _shares(recipe), can_be_spread(recipe)
    for name, stage in graph.stages.items():
        if stage.make is None or stage.light or graph.state(name).done:
            continue
        cost = stage.takes
        block = "teach" if name in (TEACH, RETRAIN) else "unlearn"
        memory = _bytes(cost, size)
        if cost.steps is None:
            fit = unjudged(stage.title, size, memory, partial(_bytes, cost), spreads)
        else:
            fit = unfit(name, size, cost.steps, memory, block, shares)
        if fit is not None:
            told.setdefault(fit.mend, []).append(fit)
    for first, *others in told.values():
        more = f"; {len(others)} more {'stages' if len(others) > 1 else 'stage'} likewise" if others else ""
        yield first._replace(line=f"{first.line}{more}")


def _bytes(cost: Cost, size: Estimator) -> float:
    return size.stage(cost).memory


def _replaced(begun: Run, here: bool) -> list[str]:
    """That a run would ask for --replace. Nothing is downloaded to tell it."""
    lost = losing(begun) if here else ""
    told = f"the folder holds finished trainings that no longer fit ({lost}); spunge run asks for --replace"
    return [told] if lost else []


def _sent(begun: Run) -> list[str]:
    """What the method would send to others before it trains. Further seeds have mostly the first one's texts, whose answers are
    kept."""
    line = begun.seeds[0]
    asking = asking_of(line.inputs.unlearn) if line.trainings else None
    if asking is None or begun.graph.state(asking.name).done:
        return []
    return list(filter(None, [asking.sent(parts_of(line), line.inputs.unlearn)]))


def trusted(recipe: Recipe) -> list[str]:
    """What a recipe names that can run code of others, or is sent texts: a line each."""
    notes = []
    if recipe.model.allow_pickle:
        notes.append(f"model.allow_pickle: pickled weights of {recipe.model.path!r} are read, which can run code")
    if recipe.model.trust_remote_code:
        paths = [recipe.model.path, *([recipe.decode.path] if recipe.decode else [])]
        notes += [f"model.trust_remote_code: Python that {path!r} carries is run" for path in paths]
    for name, value in _leaves("", recipe.model_dump(mode="json")):
        if isinstance(value, str) and re.fullmatch(r".*\.py:\w+", value, re.DOTALL):
            notes.append(f"{name}: {value!r} is run as Python")
        elif name.endswith(".scorer.base_url"):
            notes.append(f"{name}: prompts and completions are sent to {value!r}")
        elif ".include_path." in name:
            notes.append(f"{name}: Python that the task files in {value!r} name is run")
    return notes


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every plain value of a recipe, with its setting: evaluate.0.kind."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield name, value
        return
    for key, each in inner:
        yield from _leaves(f"{name}.{key}".lstrip("."), each)


def _steps(graph: RunGraph, size: Estimator | None) -> Iterator[Step]:
    """The stages that take time; a model's evaluations in one line."""
    judged: dict[str, list[str]] = {}
    for name, stage in graph.stages.items():
        if "judge:" in name:
            judged.setdefault(name.rpartition("/")[0], []).append(name)
        elif stage.make is not None and name not in ("results", "page") and not name.endswith("recipe"):
            yield _step(graph, size, stage.name, stage.told or stage.title, [name])
    for group, names in judged.items():
        titles = [graph.stages[name].told for name in names]
        yield _step(graph, size, group.replace("judge:", ""), f"judge: {', '.join(titles)}", names)


def _step(graph: RunGraph, size: Estimator | None, shown: str, title: str, names: list[str]) -> Step:
    # The state of a Hub id that is not here is not asked for: nothing is downloaded for a plan.
    done = size is not None and all(graph.state(name).done for name in names)
    if size is None:
        return Step(shown, title, done, None, None, None)
    costs = [graph.stages[name].takes for name in names]
    taken = [size.stage(cost) for cost in costs]
    if watched := sum(size.watching(cost) for cost in costs):
        title += f", and {duration(watched)} to watch it"
    seconds, memory = sum(each.seconds for each in taken), max(each.memory for each in taken)
    return Step(shown, title, done, round(seconds, 1), round(memory), round(sum(cost.kept for cost in costs)))


def _to_make(graph: RunGraph, size: Estimator | None) -> dict[str, float]:
    """Stage -> seconds, of those that are not done and take time; where these are not known, all are taken to take the same."""
    stages = [stage for stage in graph.stages.values() if stage.make is not None and not stage.light]
    if size is None:
        return {stage.name: 1.0 for stage in stages}
    return {stage.name: size.stage(stage.takes).seconds for stage in stages if not graph.state(stage.name).done}


def plan_text(planned: Plan) -> str:
    """The plan as a person reads it."""
    rows = [["", "stage", "time", "memory", "disk", "what"]]
    for step in planned.stages:
        time = duration(step.seconds) if step.seconds is not None and not step.done else ""
        sizes = [shown_size(each) if each else "" for each in (step.memory, step.disk)]
        rows.append(["done" if step.done else "to do", step.stage, time, *sizes, step.work])
    lines = [f"run folder: {planned.folder}", "", aligned(rows).rstrip("\n"), ""]
    if planned.memory is None or planned.disk is None or planned.seconds is None:
        lines.append(
            "memory, disk and time: unknown until the model is downloaded (hf download OWNER/NAME), since its files are looked at"
        )
    else:
        lines.append(
            f"about {planned.memory / 2**30:.1f} GiB of the memory of {planned.device} "
            f"({planned.device_memory / 2**30:.1f} GiB), {planned.disk / 2**30:.2f} GiB of disk, "
            f"{duration(planned.seconds)} for what is to do"
        )
    if planned.at_once > 1 and planned.first:
        about = "" if planned.elapsed is None else f"about {duration(planned.elapsed)} for what is to do; "
        first = ", ".join(planned.first[: planned.at_once])
        all_of_it = "" if planned.together is None else f", about {planned.together / 2**30:.1f} GiB together"
        lines.append(
            f"up to {planned.at_once} stages at once, each with memory of its own{all_of_it}: {about}first {first}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in (*planned.refused, *planned.notes))])


def duration(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
