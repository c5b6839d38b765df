"""The stages that train: choosing what a recipe leaves to the method, and unlearning a branch or control."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from spunge.data.samples import Samples
from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.files import fingerprint, read_json, write_json
from spunge.model.loading import Base, Through, embeddings_of, image_tokens, model_depth, positions_of
from spunge.model.packing import TOLD
from spunge.recipe.decoding import through_sum
from spunge.recipe.model import ModelSettings
from spunge.recipe.training import MethodSettings, refuse_optimizer, refuse_without_bitsandbytes
from spunge.registry import METHODS
from spunge.run.graph import Made, NotMadeError
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.keys import keyed
from spunge.run.models import Lineup, Training, stacked
from spunge.run.session import Session
from spunge.run.watching import described, told_of, watch_of, watching_inputs
from spunge.unlearning.checking import Reader, refuse_unusable
from spunge.unlearning.loop import TrainingSettings
from spunge.unlearning.method import Asking, Branch, Task
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import write_delta
from spunge.weights.overlay import moves
from spunge.weights.rounding import Storage

SETTLED = "settled.json"
STATES = "state-*.pt"  # of a training that is under way


def refuse_rows(inputs: SeedInputs) -> list[str]:
    """Remarks on the rows before any training. Raises RecipeError for those of which the model can learn nothing, and where the
    optimizer's package is missing."""
    settings = inputs.recipe.unlearn
    if not isinstance(settings, TrainingSettings):
        return []
    refuse_optimizer(settings.optimizer, "unlearn")
    refuse_unpackable(inputs.recipe.model)
    parts = {part.value: part.samples for part in inputs.parts.parts}
    method = METHODS.get(settings.method)
    method.refuse(parts, inputs.retain, settings)
    method.check(settings)
    if inputs.base.untaught.is_dir():  # else it is still to be converted
        method.refuse_base(settings, Checkpoint(inputs.base.untaught))
    asking = asking_of(settings)
    sent = [asking.sent(parts, settings)] if asking is not None else []
    return list(filter(None, sent)) + refuse_unusable(
        parts, inputs.retain, settings, reader_of(inputs.base), inputs.decouple
    )


def refuse_unpackable(model: ModelSettings) -> None:
    """Raises RecipeError where weights are to be packed and the package that does it is not installed."""
    if model.train_in is not None:
        refuse_without_bitsandbytes("model.train_in", model.train_in)


def trained_as(model: ModelSettings) -> dict[str, Any]:
    """What a training's key has of how the weights are packed and which may be trained; nothing where they are as they are."""
    told = {"model.train_in": model.train_in, "model.part": model.part}
    return {name: value for name, value in told.items() if value is not None}


def refuse_outside(base: Base, branch: Branch, name: str) -> None:
    """Raises RecipeError for a branch that changes what the recipe says is not to be trained."""
    if base.part is None:
        return
    inside = {stored for own in base.trainable(base.names) for stored in base.names[own]}
    if outside := [stored for stored in branch.changes if stored not in inside]:
        raise RecipeError(
            f"model.part: {base.part}: {name} changes {outside[0]!r}, which is of another part of the model; leave it out"
        )


def reader_of(base: BaseInputs) -> Reader:
    """What is known of the model before its weights are loaded."""
    model = base.recipe.model
    there = base.untaught.is_dir()  # else it is still to be converted
    positions = positions_of(base.untaught, model) if there else None
    seen = image_tokens(base.given, model)
    return Reader(base.tokenizer, embeddings_of(base.given, model), positions, seen)


class Choice(NamedTuple):
    """A method's settings without any `auto`."""

    settings: MethodSettings
    notes: Mapping[str, Any]


def undecided(settings: MethodSettings) -> list[str]:
    """The settings that are left to the method (`auto`); none where it settles nothing."""
    if METHODS.get(settings.method).settle is None:
        return []
    return [name for name, value in settings if value == "auto"]


def settle_inputs(inputs: SeedInputs, settings: MethodSettings) -> dict[str, Any]:
    """What the choice depends on. The rows of the parts are left out: all branches of a run have one choice, also when
    the rows of one part change later."""
    return {
        **keyed("unlearn", settings.model_dump(mode="json")),
        "method's version": METHODS.version(settings.method),
        "retain rows": inputs.retain.sha256 if inputs.retain else None,
        **({"decouple rows": inputs.decouple.sha256} if inputs.decouple else {}),
        "seed": inputs.recipe.seed,
    }


def settle(lineup: Lineup, session: Session) -> Made:
    """Let the method choose what the recipe leaves to it; kept in settled.json."""
    inputs, recipe = lineup.inputs, lineup.inputs.recipe
    parts = {part.value: part.samples for part in inputs.parts.parts}
    method = METHODS.get(inputs.unlearn.method)
    assert method.settle is not None
    settled = method.settle(session.base, parts, inputs.retain, inputs.unlearn, recipe.seed)
    content = {
        "settings": settled.settings.model_dump(mode="json"),
        "notes": dict(settled.notes),
        "measured": settled.measured,
    }
    write_json(lineup.folder / SETTLED, content)
    return Made([lineup.folder / SETTLED], "; ".join(map(str, settled.notes.values())))


def choice(lineup: Lineup) -> Choice:
    """The settings that the method chose, read from settled.json; the recipe's own where it leaves nothing open."""
    unlearn = lineup.inputs.unlearn
    return read_choice(lineup.folder / SETTLED, unlearn) if undecided(unlearn) else Choice(unlearn, {})


def read_choice(file: Path, unlearn: MethodSettings) -> Choice:
    """What a method chose. Raises RecipeError for a file that holds no choice of the settings that a recipe leaves open."""
    stored = read_json(file)
    try:
        settings = type(unlearn).model_validate(stored["settings"])
        notes = dict(stored["notes"])
    except (ValueError, TypeError, LookupError):
        settings, notes = None, {}
    if settings is None or undecided(settings):
        raise RecipeError(
            f"--out: {str(file)!r} holds no settings as a run writes them; remove it and give the same command again"
        )
    return Choice(settings, notes)


def asking_of(settings: MethodSettings) -> Asking[Any] | None:
    """What the method asks of others before it trains, where the recipe asks for it."""
    asking = METHODS.get(settings.method).asking
    return asking if asking is not None and asking.wanted(settings) else None


def parts_of(lineup: Lineup) -> dict[str, Samples]:
    return {part.value: part.samples for part in lineup.inputs.parts.parts}


def asking_inputs(lineup: Lineup, asking: Asking[Any]) -> dict[str, Any]:
    """What an answer depends on."""
    unlearn = lineup.inputs.unlearn
    return {"method's version": METHODS.version(unlearn.method), **asking.inputs(parts_of(lineup), unlearn)}


def answer_files(lineup: Lineup, asking: Asking[Any]) -> list[Path]:
    """The answer, and how it came to be."""
    return [lineup.folder / f"{asking.name}.json", lineup.folder / f"{asking.name}-asked.json"]


def ask(lineup: Lineup, asking: Asking[Any], session: Session) -> Made:
    """Ask, and keep the answer."""
    told = asking.ask(parts_of(lineup), lineup.inputs.unlearn, session.step)
    files = answer_files(lineup, asking)
    for file, content in zip(files, (told.content, dict(told.about)), strict=True):
        write_json(file, content)
    return Made(files, told.outcome)


def settings_of(training: Training, lineup: Lineup) -> Choice:
    """What a training is trained with: the recipe's settings, what the method chose, and what was answered of its rows."""
    settings, notes = choice(lineup)
    settings = training.settings(settings)
    if (asking := asking_of(settings)) is None:
        return Choice(settings, notes)
    [file, _] = answer_files(lineup, asking)
    parts = {part.value: part.samples for part in training.parts}
    try:
        return Choice(asking.settled(settings, read_json(file), parts), notes)
    except ValueError as error:
        raise RecipeError(
            f"--out: {str(file)!r} holds no answer as a run writes it ({error}); remove it and give the same command again"
        ) from None


def training_inputs(training: Training, lineup: Lineup) -> dict[str, Any]:
    """What a training's delta depends on, with the settings that the method chose."""
    inputs, unlearn = lineup.inputs, settings_of(training, lineup).settings
    content = settle_inputs(inputs, unlearn) | trained_as(inputs.recipe.model) | watching_inputs(training, inputs)
    content |= through_inputs(inputs)
    content |= {f"part {part.value}": part.samples.sha256 for part in training.parts}
    if (brought := METHODS.get(unlearn.method).inputs) is not None:
        every = [part.value for part in inputs.parts.parts]
        content["files"] = fingerprint(brought(unlearn, [part.value for part in training.parts], every))
    return content


def through_inputs(inputs: SeedInputs) -> dict[str, Any]:
    """What a training depends on where it goes through a larger model's logits."""
    decode = inputs.recipe.decode
    if decode is None or not through_sum(decode):
        return {}
    if not inputs.base.large_here:
        raise NotMadeError(f"{decode.path!r} to be downloaded")
    return {"decode.through": "sum", "decode.alpha": decode.alpha, "decode.model": inputs.base.large_key}


def train(training: Training, lineup: Lineup, key: str, session: Session) -> Made:
    """Unlearn, and write the delta. A training that was stopped goes on where it was. Of several processes that train together the
    main one writes."""
    inputs, folder, ranks = lineup.inputs, training.folder, session.ranks
    settings, notes = settings_of(training, lineup)
    base = base_for(settings, inputs, session)
    if session.activations_of is not inputs:
        session.activations.clear()
        session.activations_of = inputs
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"state-{key[:12]}.pt"
    if ranks.main:
        drop_states(folder, state)
    task = Task(
        base=base,
        parts={part.value: part.samples for part in training.parts},
        retain=inputs.retain,
        decouple=inputs.decouple,
        seeds={part.value: seed_for(inputs.recipe.seed, "branch", part.value) for part in training.parts},
        common=inputs.recipe.seed,
        log=folder / "log.jsonl" if ranks.main else None,
        state=state,
        kept=session.activations if training.after is None else {},  # of another model: a store of its own
        progress=session.step,
        watch=watch_of(training, lineup, key, session),
    )
    started = time.perf_counter()
    with stacked(training.earlier, base):
        branch = METHODS.get(settings.method).unlearn(task, settings)
    if not ranks.main:
        return Made([])
    refuse_outside(base, branch, training.name)
    seconds = time.perf_counter() - started - (branch.watched.seconds if branch.watched else 0.0)
    info = {
        "base": inputs.base.weights,
        "method": settings.method,
        "settings": settings.model_dump(mode="json"),
        "parts": [{"value": p.value, "rows": len(p.samples), "sha256": p.samples.sha256} for p in training.parts],
        "seeds": dict(task.seeds),
        "steps": branch.steps,
        "stopped": branch.stopped,
        "losses": dict(branch.losses),
        "notes": {**notes, **branch.notes, **_told_of(base)},
        "seconds": round(seconds, 2),
        **_watched(training, inputs, branch),
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "train_in": base.train_in,
        **({"part": base.part} if base.part else {}),
        **({"processes": ranks.count} if ranks.shared else {}),
    }
    delta = write_delta(folder, branch.changes, info)
    merge = inputs.recipe.merge
    if not moves(Checkpoint(inputs.base.folder), delta, Storage(merge.dtype, merge.rounding)):
        block = "controls" if training.own else "unlearn"
        raise RecipeError(
            f"{block}.learning_rate: all that {training.name} changed is lost in rounding when it is added to the base; raise it, "
            "or the number of steps"
        )
    log = [task.log] if task.log and task.log.exists() else []
    remarks = [str(branch.stopped)] if branch.stopped else []
    remarks += told_of(info.get("watched"))
    remarks += [f"{name}: {note}" for name, note in branch.notes.items() if name == "out of memory"]
    said = f" ({'; '.join(remarks)})" if remarks else ""
    return Made([folder / "delta.safetensors", folder / "delta.json"], f"{branch.steps} steps{said}", log)


def drop_states(folder: Path, state: Path) -> None:
    """Remove the states that trainings with other keys left."""
    for other in folder.glob(STATES):
        if not other.name.startswith(state.stem):
            other.unlink()


def _watched(training: Training, inputs: SeedInputs, branch: Branch) -> dict[str, Any]:
    """What became of the recipe's watch. Raises RecipeError where a method trained without it."""
    if inputs.recipe.watch is None:
        return {}
    if branch.watched is None:
        raise RecipeError(
            f"watch: {inputs.unlearn.method!r} trains in its own way and was not watched; leave watch out"
        )
    return {"watched": described(training, inputs, branch.watched)}


def _told_of(base: Base) -> dict[str, str]:
    return {} if base.train_in is None else {"base": f"in {TOLD[base.train_in]} while this was trained beside it"}


def base_for(settings: MethodSettings, inputs: SeedInputs, session: Session) -> Base:
    """What training needs of the base: its first blocks where the method says that these are enough."""
    decode = inputs.recipe.decode
    if decode is not None and through_sum(decode):
        larger, base = session.larger, session.base
        reached = [each.positions for each in (larger, base) if each.positions is not None]
        return replace(base, through=Through(larger.model, decode.alpha), positions=min(reached, default=None))
    last_block = METHODS.get(settings.method).last_block
    if last_block is None or inputs.recipe.watch is not None:  # what is measured is the whole model
        return session.base
    return session.first_blocks(last_block(settings, model_depth(inputs.base.folder, inputs.recipe.model)))
