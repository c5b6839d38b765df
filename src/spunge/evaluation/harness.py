"""lm-evaluation-harness's tasks (Gao et al. 2021): found, changed, given local files, and kept quiet.

A group is taken apart into its single tasks, so that changes reach each of them whatever its groups say.
"""

import contextlib
import difflib
import functools
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spunge.errors import RecipeError, suggestion
from spunge.model.loading import Base
from spunge.temporary import TemporaryFolder

SEED = 1234  # of the harness's command line, for few-shot draws and sampling
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

Files = str | list[str]


class Leaf(NamedTuple):
    """A single task of the harness, and what is laid over its configuration."""

    name: str
    changes: dict[str, Any]


def installed() -> str:
    """The harness's version. Raises RecipeError where it is missing."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise RecipeError("evaluate.kind: lm_eval needs lm-evaluation-harness; pip install 'spunge[judge]'") from None


def manager_of(names: Sequence[str], include_path: Sequence[str]) -> Any:
    """The harness's manager of tasks, which knows those of its own and those in the given folders, which win.

    Its own take it some seconds to read: they are left out where the folders define all that is named.
    """
    for folder in include_path:
        if not os.path.isdir(folder):
            raise RecipeError(f"evaluate.include_path: no folder {folder!r}")
    own = tuple(include_path)
    alone = task_manager(own, False) if own else None
    return alone if alone and all(is_whole(name, alone.task_index) for name in names) else task_manager(own, True)


@functools.lru_cache(maxsize=4)
def task_manager(own: tuple[str, ...], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(own) or None, include_defaults=defaults)


def is_whole(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the index holds all of a task or group. A tag's tasks may lie anywhere."""
    if name not in index or index[name].kind.name == "TAG":
        return False
    if index[name].kind.name != "GROUP":
        return True
    return all(isinstance(member, str) and is_whole(member, index) for member in _listed_members(index[name].cfg))


def _listed_members(group: Mapping[str, Any]) -> list[Any]:
    return group["task"] if isinstance(group["task"], list) else [group["task"]]


def leaves_of(
    task: str, shots: int | None, files: Mapping[str, Any], overrides: Mapping[str, Any], index: Mapping[str, Any]
) -> list[Leaf]:
    """A benchmark's single tasks with their changes: its groups', the shots, its files and overrides, its own ones."""
    given = {} if shots is None else {"num_fewshot": shots}
    leaves = []
    for leaf in _members(task, index):
        changes = {**leaf.changes, **given}
        for name in dict.fromkeys((task, leaf.name)):
            config = {**(index[leaf.name].cfg or {}), **changes}
            changes |= laid_over(leaf.name, config, files.get(name), overrides.get(name, {}))
        leaves.append(Leaf(leaf.name, changes))
    return leaves


def check_names(tasks: Sequence[str], changed: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
    """Raises RecipeError for a task that nobody has, and for a change (by its setting) of one that is not asked."""
    for task in tasks:
        if task not in index:
            near = difflib.get_close_matches(task, list(index), n=1)
            raise RecipeError(f"evaluate.tasks: lm_eval has no task {task!r}{suggestion(task, near)}")
    known = {name for task in tasks for name in (task, *(leaf.name for leaf in _members(task, index)))}
    for setting, given in changed.items():
        for name in given:
            if name not in known:
                raise RecipeError(f"evaluate.{setting}: {name!r} is none of the tasks{suggestion(name, sorted(known))}")


def _members(name: str, index: Mapping[str, Any]) -> list[Leaf]:
    """The single tasks of a task, group or tag, with what their groups lay over them."""
    listed = index[name]
    if listed.kind.name == "TAG":
        return [Leaf(task, {}) for task in sorted(listed.tags)]
    if listed.kind.name != "GROUP":
        return [Leaf(name, {})]
    return _inside(listed.cfg, index)


GROUP_KEYS = ("group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata", "include", "version")


def _inside(group: Mapping[str, Any], index: Mapping[str, Any]) -> list[Leaf]:
    common = {key: value for key, value in group.items() if key not in GROUP_KEYS}
    leaves = []
    for member in _listed_members(group):
        content = {"task": member} if isinstance(member, str) else dict(member)
        if isinstance(content["task"], list):
            inner = _inside(content, index)
        elif content["task"] in index:
            own = {key: value for key, value in content.items() if key not in GROUP_KEYS}
            inner = [Leaf(leaf.name, {**leaf.changes, **own}) for leaf in _members(content["task"], index)]
        else:
            raise RecipeError(f"evaluate.tasks: a group's member {content['task']!r} is no task; name its tasks")
        leaves += [Leaf(leaf.name, {**common, **leaf.changes}) for leaf in inner]
    return leaves


def laid_over(
    name: str, config: Mapping[str, Any], files: "Files | dict[str, Files] | None", overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Overrides of a task's configuration, with those that reading its questions from local files needs."""
    options = dict(overrides.get("dataset_kwargs") or {})
    reader = overrides.get("dataset_path")
    if files is None and reader in READERS.values():
        files = options.pop("data_files", None)
    if files is None:
        return dict(overrides)
    asked = config.get("test_split") or config.get("validation_split") or "test"
    by_split = files if isinstance(files, dict) else {asked: files}
    if asked not in by_split:
        if config.get("validation_split") not in by_split:
            raise RecipeError(f"evaluate.files: {name!r} asks what is in its split {asked!r}; name a file for it")
        asked = config["validation_split"]
    first = next(iter(by_split.values()))
    suffix = Path(first if isinstance(first, str) else first[0]).suffix
    changes: dict[str, Any] = {
        "dataset_path": reader or READERS.get(suffix, "json"),
        "dataset_name": None,
        "dataset_kwargs": {**options, "data_files": by_split},
        **{key: config[key] if config.get(key) in by_split else None for key in SPLITS},
        "test_split": asked,
        "validation_split": None,
    }
    examples = config.get("fewshot_config") or {}
    if config.get("num_fewshot") and not (
        changes["training_split"] or changes["fewshot_split"] or "samples" in examples
    ):
        changes["fewshot_split"] = asked  # the harness leaves the question itself out then
    return changes | {key: value for key, value in overrides.items() if key not in ("dataset_path", "dataset_kwargs")}


def loaded(manager: Any, task: str, shots: int | None, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The tasks by name, with their data. Raises RecipeError where these cannot be had."""
    # Inside a group, changes are laid over a task that the harness knows; outside they would be all of it.
    members = [{"task": leaf.name, **_uncached(leaf.changes)} for leaf in leaves]
    try:
        tasks: dict[str, Any] = manager.load([{"group": "spunge", "task": members}])["tasks"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(
            f"evaluate.tasks: {task!r} could not be loaded ({reason}); offline, give its questions by files"
        ) from error
    for each in tasks.values():
        if shots is not None or each.get_config("num_fewshot") is None:
            each.set_config("num_fewshot", shots or 0)
        each.set_fewshot_seed(SEED)
    return tasks


def _uncached(changes: dict[str, Any]) -> dict[str, Any]:
    """With the copies that datasets makes of local files in a folder that goes with this process."""
    options = changes.get("dataset_kwargs") or {}
    return (
        {**changes, "dataset_kwargs": {**options, "cache_dir": str(_copies().path)}}
        if "data_files" in options
        else changes
    )


@functools.cache
def _copies() -> TemporaryFolder:
    return TemporaryFolder("questions")


def local_files(
    files: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]], include_path: Sequence[str]
) -> list[Path]:
    """All local files that the outcome depends on. Raises RecipeError for a missing one."""
    given = list(files.values())
    given += [(over.get("dataset_kwargs") or {}).get("data_files", []) for over in overrides.values()]
    named = [
        file
        for each in given
        for part in (each.values() if isinstance(each, dict) else [each])
        for file in ([part] if isinstance(part, str) else part)
    ]
    for file in named:
        if "://" not in file and not any(mark in file for mark in "*?[") and not os.path.isfile(file):
            raise RecipeError(f"evaluate.files: no file {file!r}")
    folders = [Path(folder) for folder in include_path]
    own = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in (".yaml", ".py")]
    return [*(Path(file) for file in dict.fromkeys(named) if os.path.isfile(file)), *own]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the harness prints and draws is not shown; its errors are raised."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def seeded(base: Base) -> Iterator[None]:
    """The harness's own seeds inside, and every generator as it was after."""
    state, numbers, training = random.getstate(), np.random.get_state(), base.model.training
    try:
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
        base.model.train(training)
