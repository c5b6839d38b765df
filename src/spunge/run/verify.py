"""Is a finished run's folder what the run wrote? Every stamp, every file's checksum, and the merged model, tensor by tensor.

Needs neither the rows nor a graph: stamps name each other's keys. The base is needed for the merged model alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.files import read_json
from spunge.merging.verification import differing_tensors
from spunge.model.layered import base_folder
from spunge.progress import SILENT, Watcher
from spunge.recipe.loading import load_recipe
from spunge.run.folder import FAILED, runs_in
from spunge.run.models import calibration_file
from spunge.run.stamps import Stamp, faults, other_making, stamp_file, stamps_in
from spunge.weights.delta import open_delta
from spunge.weights.sources import DeltaSource


@dataclass
class Verification:
    """What was checked, and what is wrong: lines that name a file."""

    folder: str
    stages: int = 0
    files: int = 0
    nbytes: int = 0
    tensors: int = 0  # of merged models, found to be base + merge of the deltas
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be checked, and logs that nothing depends on

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: str | Path, watcher: Watcher | None = None) -> Verification:
    """Check a run's folder, or those of a search, against the stamps. Writes nothing. Raises RecipeError where it is neither's."""
    folder, watcher = Path(folder).resolve(), watcher or SILENT
    runs = runs_in(folder)
    if runs == [folder]:
        return _verify(folder, watcher)
    every = Verification(str(folder))
    for run in runs:
        if (run / FAILED).exists():
            continue
        name, checked = run.relative_to(folder).as_posix(), _verify(run, watcher)
        every.stages, every.files = every.stages + checked.stages, every.files + checked.files
        every.nbytes, every.tensors = every.nbytes + checked.nbytes, every.tensors + checked.tensors
        every.problems += (f"{name}: {line}" for line in checked.problems)
        every.notes += (f"{name}: {line}" for line in checked.notes)
    return every


def _verify(folder: Path, watcher: Watcher) -> Verification:
    if not (folder / "stamps").is_dir():
        raise RecipeError(f"{str(folder)!r} holds no stamps; give the folder of a run (spunge run)")
    checked = Verification(str(folder))
    stamps = {stamp.stage: stamp for stamp in stamps_in(folder)}
    whole = {stamp_file(folder, name) for name in stamps}
    for file in sorted((folder / "stamps").rglob("*.json")):
        if file not in whole:
            checked.problems.append(f"{file.relative_to(folder).as_posix()} is damaged")
    watcher.begin("verify the files")
    for number, stamp in enumerate(stamps.values()):
        watcher.step(number, len(stamps))
        _check_files(checked, folder, stamp)
    watcher.end(f"{checked.files} files")
    if dropped := sum(bool(stamp.dropped) for stamp in stamps.values()):
        checked.notes.append(f"the texts of {dropped} judgings were dropped; their scores are there")
    checked.problems += _broken_chain(folder, stamps)
    if checked.problems:
        checked.notes.append("the merged model was not compared with base + merge of the deltas: see the problems")
        return checked
    for name, stamp in stamps.items():
        if name == "merged" or name.endswith(":merged"):
            _check_merged(checked, folder / Path(next(iter(stamp.files))).parent, stamps, watcher)
    return checked


def _check_files(checked: Verification, folder: Path, stamp: Stamp) -> None:
    checked.stages += 1
    checked.files += len(stamp.files)
    checked.nbytes += stamp.size
    checked.problems += map(str, faults(folder, stamp, byproducts=False))
    checked.notes += (f"{fault}, but nothing depends on it" for fault in faults(folder, stamp, byproducts=True))


def _broken_chain(folder: Path, stamps: dict[str, Stamp]) -> Iterator[str]:
    """Stages that the results rest on and that are not there as they were."""
    for last in ("results", "page"):
        if last not in stamps:
            yield f"stamps/{last}.json is missing: the run is not finished"
            return
        yield from other_making(folder, stamps, last)


def _check_merged(checked: Verification, folder: Path, stamps: Mapping[str, Stamp], watcher: Watcher) -> None:
    """RUN/merged, or RUN/seeds/SEED/merged, is base + merge of the stored deltas. `folder`: the one it lies in."""
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        name = "base" if recipe.teach is None else "taught"
        made = any(file.startswith(f"{name}/") for stamp in stamps.values() for file in stamp.files)
        base = Path(checked.folder) / name if made else base_folder(recipe.model)
    except RecipeError as error:
        checked.notes.append(f"the merged model was not compared with the base: {error}")
        return
    merge = recipe.merge
    if recipe.calibrate is not None:
        merge = merge.model_copy(update={"scale": read_json(calibration_file(folder, "merged"))["scale"]})
    parts = (read_json(folder / "split.json") or {}).get("parts") or []
    watcher.begin("verify the merged model")
    try:
        sources = [DeltaSource(open_delta(folder / "branches" / part["slug"]), part["value"]) for part in parts]
        for name, same in differing_tensors(base, sources, merge, folder / "merged"):
            checked.tensors += 1
            if not same:
                checked.problems.append(f"merged: tensor {name!r} is not base + merge of the deltas")
    except (RecipeError, OSError) as error:
        checked.problems.append(f"merged: {error}")
    watcher.end(f"{checked.tensors} tensors")
