"""What stands at --out already: nothing, this very merge, another one, or something that no merge wrote."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spunge.errors import RecipeError
from spunge.files import alone, clear_replaced, disk_errors_told, fingerprint, is_inside, read_json
from spunge.merging.moments import taking
from spunge.recipe.merging import RuleSettings
from spunge.registry import RULES
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.folder import description_sha256
from spunge.weights.moments import moments_of
from spunge.weights.sources import Source

REPORT = "merge.json"
CHECKPOINT = "checkpoint"  # the form of a merge that is a model of its own
DAMAGED = f"--out: {REPORT} is damaged; give --replace to make the merge again, or another folder"


def merge_key(
    base: Checkpoint, sources: Sequence[Source], weights: Sequence[float], settings: RuleSettings, form: str
) -> str:
    """Fingerprint of what a merge's output depends on. form: CHECKPOINT, delta, or adapter and its rank."""
    models = [
        [source.fingerprint, list(source.stamps), source.label, weight]
        for source, weight in zip(sources, weights, strict=True)
    ]
    kind = RULES.get(settings.rule).moments
    moments = [moments_of(source, kind, taking(settings), settings.rule) for source in sources if kind]
    return fingerprint(
        {
            "rule": settings.model_dump(mode="json"),
            "version": RULES.version(settings.rule),
            "models": models,
            **({"moments": [each.fingerprint for each in moments]} if moments else {}),
            "base": [stamp(file) for file in base.files],
            # Copied beside the weights of a checkpoint.
            "beside": description_sha256(base.folder) if form == CHECKPOINT else None,
            "form": form,
        }
    )


def earlier(out: Path, key: str, replace: bool) -> dict[str, Any] | None:
    """The report of this very merge where `out` holds it; None where it is to be made.

    Raises RecipeError for a folder that no merge wrote and, unless `replace`, for one that another merge wrote, or whose
    weights were changed since.
    """
    if not out.exists():
        return None
    if not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).exists()):
        raise RecipeError(f"--out: {str(out)!r} exists and no merge wrote it; give another folder")
    content = read_json(out / REPORT)
    if _is_this(out, content, key):
        clear_replaced(out)
        return dict(content)
    if replace or not (out / REPORT).exists():
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        raise RecipeError(f"--out: {str(out)!r} holds another merge; give another folder, or --replace")
    files = content.get("files")
    if all(os.path.exists(out / name) for name in (files if isinstance(files, dict) else ()) if is_inside(name)):
        raise RecipeError(f"--out: the weights in {str(out)!r} were changed since; give another folder, or --replace")
    return None


def unfinished(out: Path) -> Path:
    """The folder beside `out` in which a merge is made."""
    return out.with_name(f".{out.name}.merging")


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Inside the block, no other process merges into `out`. Gives the folder beside it that stands for the claim.

    Raises RecipeError where another process does.
    """
    aside = unfinished(out.resolve())
    with disk_errors_told(aside):
        aside.mkdir(parents=True, exist_ok=True)
        with alone(aside):
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def _is_this(out: Path, content: Any, key: str) -> bool:
    """Whether a report is of the merge with this key, and the files are there as it wrote them."""
    if not isinstance(content, dict) or content.get("key") != key:
        return False
    if not isinstance(content.get("files"), dict) or not all(map(is_inside, content["files"])):
        return False
    files = {name: out / name for name in content["files"]}
    return all(os.path.isfile(file) and file.stat().st_size == content["files"][name] for name, file in files.items())


def weight_files(folder: Path) -> dict[str, int]:
    """The weight files in a finished folder, with their sizes."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def stamp(file: Path) -> list[Any]:
    """What changes when a file does: cheap, for deciding whether a merge may go on, or is the same again."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]
