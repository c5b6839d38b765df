"""The saved state of a training: one file, or a file for each of the processes that train together and one that names them."""

from pathlib import Path
from typing import Any

import torch

from spunge.errors import RecipeError
from spunge.files import written
from spunge.model.ranks import Ranks


def store_state(file: Path, content: dict[str, Any], step: int, ranks: Ranks) -> None:
    """Keep a process's state after a step. The states of all are those of one step, or they are the ones kept before."""
    if not ranks.shared:
        _write(file, content)
        return
    _write(_shard(file, step, ranks.rank), content)
    ranks.wait()
    if ranks.main:
        _write(file, {"step": step, "processes": ranks.count})
        for other in file.parent.glob(f"{file.stem}.*{file.suffix}"):
            if not other.name.startswith(f"{file.stem}.{step}-"):
                other.unlink()
    ranks.wait()  # none ends before the states are kept


def stored_state(file: Path, ranks: Ranks) -> dict[str, Any] | None:
    """This process's state, if there is one. Raises RecipeError where it was kept by another number of processes."""
    if not file.exists():
        return None
    content = _read(file)
    count = content.get("processes", 1)
    if count != ranks.count:
        before = (
            "this training was begun by one process, and goes on in one"
            if count == 1
            else (f"this training was begun by {count} processes, and goes on with as many")
        )
        give = "{kind: here}" if count == 1 else f"{{kind: sharded, processes: {count}}}"
        raise RecipeError(
            f"execution: {before}; set execution to {give}, or remove {str(file)!r} to begin this training anew"
        )
    return _read(_shard(file, content["step"], ranks.rank)) if ranks.shared else content


def _shard(file: Path, step: int, rank: int) -> Path:
    return file.with_name(f"{file.stem}.{step}-{rank}{file.suffix}")


def _write(file: Path, content: dict[str, Any]) -> None:
    with written(file) as aside, aside.open("wb") as stream:
        torch.save(content, stream)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content
