"""Copies on this machine of files and folders that a recipe names on another one: on nodes of a cluster that do not share a disk.

A recipe keeps its own paths, as they stand in what a run writes; where a file is opened, the copy is asked for.
"""

from collections.abc import Mapping
from pathlib import Path

_COPIES: dict[str, tuple[Path, ...]] = {}


def know_copies(copies: Mapping[str, tuple[Path, ...]]) -> None:
    """From now on, these paths of a recipe stand for these files (rows) or this folder (a model). Others are forgotten."""
    _COPIES.clear()
    _COPIES.update(copies)


def copies_of(path: str) -> tuple[Path, ...] | None:
    """The files that a path stands for here; None where it is not known as another machine's."""
    return _COPIES.get(path)


def folder_here(path: str) -> str:
    """A model's folder on this machine: its copy, where it has one, or the path itself."""
    return str(_COPIES[path][0]) if path in _COPIES else path
