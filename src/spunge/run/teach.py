"""The stages that teach: the given model is fine-tuned on rows, and what comes of it is a checkpoint in the run's folder.

Teaching may take longer than all the rest, so a taught model is kept in the cache folder too, under the key of all that it
depends on: every recipe that teaches the same takes it from there, after every file's checksum was found right.
"""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spunge.data.samples import Samples
from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.files import (
    alone,
    cache_folder,
    checksum,
    is_inside,
    read_json,
    sealed,
    unsealed,
    whole_folder,
    write_json,
    write_text,
)
from spunge.merging.card import taught_card
from spunge.merging.copying import share
from spunge.merging.earlier import REPORT
from spunge.merging.engine import merge
from spunge.recipe.merging import RuleSettings
from spunge.recipe.rows import Rows
from spunge.recipe.teaching import TeachSettings
from spunge.recipe.training import refuse_optimizer
from spunge.registry import RULES
from spunge.run.folder import all_alone, runs_in
from spunge.run.graph import Made
from spunge.run.inputs import BaseInputs, SeedInputs
from spunge.run.keys import keyed
from spunge.run.merge import files_below
from spunge.run.session import Session
from spunge.run.stamps import read_stamp
from spunge.run.train import drop_states, reader_of, refuse_unpackable, trained_as
from spunge.unlearning.checking import refuse_samples
from spunge.unlearning.finetuning import teach
from spunge.unlearning.method import Task
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.delta import Delta, write_delta
from spunge.weights.folder import TAUGHT, name_of
from spunge.weights.overlay import moves
from spunge.weights.rounding import Storage
from spunge.weights.sources import DeltaSource

TEACH, RETRAIN = "taught", "retrained"  # the stages that make the base, and a reference
VERSION = 2  # rises when the same settings and rows teach something else
ROWS = set(Rows.model_fields)  # what says which rows are taught: for these stands the rows' own hash
PATIENCE = 600.0  # seconds that another process is given to write into the cache what it taught
SEAL = "sealed.json"  # in a folder of the cache: what its files are


@dataclass(frozen=True)
class Teaching:
    """A model that comes of fine-tuning the given one."""

    name: str  # its stage
    folder: Path  # of the checkpoint
    work: Path  # of what there is until then, and of its log
    settings: TeachSettings
    samples: Samples


def teachings(inputs: SeedInputs) -> list[Teaching]:
    """What the recipe asks to be taught: the base, and a reference without the rows to forget."""
    base, settings = inputs.base, inputs.recipe.teach
    asked = {TEACH: (base.taught, base.lesson), RETRAIN: (base.retrained, inputs.reference)}
    return [
        Teaching(name, folder, folder.parent / "teaching" / folder.name, settings, rows.samples)
        for name, (folder, rows) in asked.items()
        if settings is not None and rows is not None
    ]


def teaching_inputs(teaching: Teaching, base: BaseInputs) -> dict[str, Any]:
    """What a taught model depends on beside the given one."""
    return {
        **keyed("teach", teaching.settings.model_dump(mode="json", exclude=ROWS)),
        **trained_as(base.recipe.model),
        "teaching's version": VERSION,
        "rows": teaching.samples.sha256,
    }


def refuse_lessons(teachings: Sequence[Teaching], base: BaseInputs) -> list[str]:
    """Remarks on the rows before any of them is taught. Raises RecipeError for those of which nothing can be learned."""
    remarks: list[str] = []
    # What a reference is taught is some of what the base is taught.
    for teaching in teachings[:1]:
        settings = teaching.settings
        refuse_optimizer(settings.optimizer, "teach")
        refuse_unpackable(base.recipe.model)
        if settings.packing and not teaching.samples.plain:
            raise RecipeError(
                "teach.packing: prompts and completions are not packed, only plain texts; set it to false"
            )
        remarks += refuse_samples(teaching.samples, reader_of(base), settings.max_length, "teach", "teach.max_length")
    return remarks


def make_taught(teaching: Teaching, base: BaseInputs, key: str, session: Session) -> Made:
    """Teach the given model, or take what was taught from the cache. One that was stopped goes on where it was. Of several
    processes that teach together the main one writes."""
    ranks = session.ranks
    if ranks.any(ranks.main and _from_cache(teaching, key)):
        return Made(files_below(teaching.folder) if ranks.main else [], "from the cache")
    teaching.work.mkdir(parents=True, exist_ok=True)
    if (taught := _taught(teaching, base, key, session)) is None:
        return Made([])
    told, delta = taught
    settings = RULES.get("task_arithmetic").settings.model_validate(
        {"rule": "task_arithmetic", "dtype": teaching.settings.dtype}
    )
    _write(teaching, base, delta, settings, told, session)
    shutil.rmtree(delta.folder)
    _to_cache(teaching, key)
    return Made(files_below(teaching.folder), f"{told['steps']} steps", [teaching.work / "log.jsonl"])


def _taught(teaching: Teaching, base: BaseInputs, key: str, session: Session) -> tuple[dict[str, Any], Delta] | None:
    """What is said of the teaching, and what it changed; None in a process that writes nothing."""
    settings, samples = teaching.settings, teaching.samples
    state = teaching.work / f"state-{key[:12]}.pt"
    if session.ranks.main:
        drop_states(teaching.work, state)
    given = session.untaught
    task = Task(
        base=given,
        parts={"": samples},
        retain=None,
        seeds={"": seed_for(settings.seed, "teach")},
        log=teaching.work / "log.jsonl" if session.ranks.main else None,
        state=state,
        progress=session.step,
        setting="teach",
    )
    started = time.perf_counter()
    branch = teach(task, settings)
    if not session.ranks.main:
        return None
    plain = Checkpoint(base.untaught)
    told = {
        "model": name_of(base.untaught),
        "base": plain.fingerprint(),
        "rows": len(samples),
        "sha256": samples.sha256,
        "settings": settings.model_dump(mode="json", exclude=ROWS),
        "steps": branch.steps,
        "losses": dict(branch.losses),
        "notes": dict(branch.notes),
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(given.device),
        "dtype": str(given.dtype).removeprefix("torch."),
        "train_in": given.train_in,
        **({"processes": session.ranks.count} if session.ranks.shared else {}),
    }
    delta = write_delta(teaching.work / "delta", branch.changes, {"base": told["base"]}, "teach")
    told["tensors"] = delta.tensors
    if not moves(plain, delta, Storage(settings.dtype)):
        raise RecipeError(
            "teach.learning_rate: all that was taught is lost in rounding when it is added to the model; raise it, or the "
            "number of steps, or set teach.dtype to float32"
        )
    return told, delta


def _write(
    teaching: Teaching,
    base: BaseInputs,
    delta: Delta,
    settings: RuleSettings,
    told: Mapping[str, Any],
    session: Session,
) -> None:
    """The given model with what was taught, as a checkpoint of its own: written as a merge of one delta is."""
    folder = teaching.folder
    shutil.rmtree(folder, ignore_errors=True)  # whatever stands there, nothing vouches for it
    sources = [DeltaSource(delta, "what was taught")]
    merge(base.untaught, sources, settings, folder, progress=session.step, setting="model.path")
    (folder / REPORT).unlink()
    write_json(folder / TAUGHT, dict(told))
    write_text(folder / "README.md", taught_card(base.untaught, told))


def _cached(key: str) -> Path:
    return cache_folder() / "taught" / key[:32]


def _from_cache(teaching: Teaching, key: str) -> bool:
    """Take a taught model from an earlier run: every file whole, or none."""
    kept = _cached(key)
    stored = unsealed(read_json(kept / SEAL))
    if stored is None or stored.get("key") != key or not all(map(is_inside, stored["files"])):
        return False
    try:
        with whole_folder(teaching.folder, replace=True) as aside:
            for name, mark in stored["files"].items():
                share(kept / name, aside / name)
                if checksum(aside / name) != mark:
                    raise ValueError(name)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _to_cache(teaching: Teaching, key: str) -> None:
    """Keep a taught model for other runs. Where the cache cannot be written, nothing is kept."""
    kept = _cached(key)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with alone(kept.parent, PATIENCE), whole_folder(kept, replace=True) as aside:
            marks = {}
            for file in files_below(teaching.folder):
                name = file.relative_to(teaching.folder).as_posix()
                share(file, aside / name)
                marks[name] = checksum(aside / name)
            write_json(aside / SEAL, sealed({"key": key, "files": marks}))
    except (OSError, RecipeError):
        return


def clean_taught(folder: str | Path) -> int:
    """Remove what the cache keeps of the models that a run taught, or the runs of a search; their own stay. How many there were.
    Raises RecipeError where the folder is neither's, or a process is at work in it."""
    runs = runs_in(folder)
    with all_alone({Path(folder).resolve(), *runs}):
        stamps = filter(None, (read_stamp(run, stage) for run in runs for stage in (TEACH, RETRAIN)))
        return sum(_drop_cached(key) for key in {stamp.key for stamp in stamps})


def _drop_cached(key: str) -> bool:
    kept = _cached(key)
    if not re.fullmatch(r"[0-9a-f]{64}", key) or not kept.is_dir():
        return False  # or a stamp that another hand wrote
    shutil.rmtree(kept, ignore_errors=True)
    return True
