"""Take a finished stage from another run's folder: the same key is the same work, whichever recipe asked for it.

The files get a second name, or share their blocks: each stage writes its files anew and never into one that is there.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spunge.merging.copying import share
from spunge.progress import Watcher
from spunge.run.graph import NotMadeError
from spunge.run.stages.naming import RunGraph
from spunge.run.stamps import Stamp, faults, read_stamp, stamp_file, store_stamp


def take(graph: RunGraph, name: str, others: Sequence[Path], watcher: Watcher) -> bool:
    """Take a stage's files and stamp from the first of the folders that holds them whole. Whether one did."""
    if not others or graph.stages[name].make is None or graph.stages[name].own:
        return False
    try:
        key = graph.key(name)
    except NotMadeError:
        return False
    for folder in others:
        stamp = read_stamp(folder, name)
        told = f"{folder.parent.name}/{folder.name}"
        if stamp is not None and stamp.key == key and not stamp.dropped and _taken(graph, folder, stamp, told):
            watcher.begin(graph.stages[name].title)
            watcher.end(f"from {told}")
            return True
    return False


def _taken(graph: RunGraph, folder: Path, stamp: Stamp, told: str) -> bool:
    """The checksums are those of the other run: what arrives is held against them. The time that it took is that run's alone."""
    stamp_file(graph.folder, stamp.stage).unlink(missing_ok=True)
    try:
        for path, mark in stamp.files.items():
            target = graph.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            # A training that goes on adds to its log.
            (shutil.copyfile if mark.byproduct else share)(folder / path, target)
    except (FileNotFoundError, IsADirectoryError):
        return False
    if any(faults(graph.folder, stamp, byproducts=False)):
        for path in stamp.files:
            (graph.folder / path).unlink(missing_ok=True)  # nothing vouches for it
        return False
    graph.renewed(store_stamp(graph.folder, replace(stamp, seconds=0.0, taken=told)))
    return True
