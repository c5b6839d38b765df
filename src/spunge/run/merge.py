"""The stage that merges the branches' deltas into RUN/merged, and the one that converts a pickled or quantised base."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spunge.files import write_json
from spunge.merging.engine import merge
from spunge.model.conversion import convert
from spunge.registry import RULES
from spunge.run.graph import Made
from spunge.run.inputs import BaseInputs
from spunge.run.keys import flattened
from spunge.run.models import Lineup, Model, delta_sources
from spunge.run.session import Session
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import refuse_idle_rounding, written_dtype


def merged_inputs(model: Model) -> dict[str, Any]:
    """What a merge depends on beside the base and the branches: its rule and settings, and the branches' order."""
    assert model.merge is not None
    settings = model.merge.model_dump(mode="json")
    return {**flattened("merge", settings), "rule's version": RULES.version(model.merge.rule)}


def refuse_merges(lineups: Sequence[Lineup]) -> None:
    """Raises RecipeError, before anything is trained, for settings of a merge that would not be read."""
    base = lineups[0].inputs.base
    if base.untaught.is_dir():  # else it is still to be converted
        for merge in [model.merge for model in lineups[0].models if model.merge is not None]:
            refuse_idle_rounding(
                merge.rounding, [written_dtype(Checkpoint(base.untaught), base.own_dtype(merge.dtype))]
            )


def merge_branches(lineup: Lineup, session: Session) -> Made:
    """Merge the branches into `merged`, with a report beside it in merge.json."""
    model = lineup.models[-1].settled
    assert model.merge is not None
    assert model.folder is not None
    shutil.rmtree(model.folder, ignore_errors=True)  # whatever stands there, nothing vouches for it
    report = merge(
        lineup.inputs.base.folder,
        delta_sources(model.trainings),
        model.merge,
        model.folder,
        progress=session.step,
        setting="model.path",
    )
    file = lineup.folder / "merge.json"
    write_json(file, report.to_json())
    told = "; ".join([f"{len(report.changed)} tensors changed", *report.notes])
    return Made([file, *files_below(model.folder)], told)


def convert_base(base: BaseInputs) -> Made:
    """Write a base of pickled or quantised weights as plain safetensors into RUN/base."""
    shutil.rmtree(base.converted, ignore_errors=True)  # whatever stands there, nothing vouches for it
    convert(base.given, base.converted, base.recipe.model)
    return Made(files_below(base.converted), "converted to safetensors")


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]
