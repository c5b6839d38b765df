"""What a stage needs goes to a node that does not see the run's folder, and what it makes comes back.

The command bundles what a stage needs: the recipe's rows and models, the files of the stages before it, and what a stopped making
left. A node lays these out in a folder of its own, a mirror of RUN, makes the stage there, and puts what is new at the address.
States of a training are put as they are saved, with a note of them, from which the stage goes on elsewhere.
"""

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from spunge.copies import know_copies
from spunge.data.rows import SHIPPED, find_files
from spunge.errors import LostError, RecipeError
from spunge.files import HELD, LOCK, PART, cache_folder, fingerprint, is_inside, taken
from spunge.recipe.rows import Source
from spunge.recipe.schema import Recipe
from spunge.run.executors.artifacts import Artifacts, Cache, Mark, mark_of
from spunge.run.executors.executor import Done
from spunge.run.graph import Stage
from spunge.run.session import Session
from spunge.run.stages.building import Run
from spunge.run.stages.naming import RunGraph
from spunge.run.stamps import read_stamp, stamp_file

SAVED = 1.0  # seconds between two looks for states that were saved
STATE = ".pt"  # the ending of the state of a training that is under way
APART = ("execution", "track")  # blocks of a recipe that name nothing a stage reads


class Bundle(NamedTuple):
    """All that a node fetches for a stage."""

    address: str
    note: str  # name of the note on the stage's saved states
    files: Mapping[str, Mark]  # path relative to RUN
    rows: Mapping[str, tuple[tuple[str, Mark], ...]]  # as the recipe names them: names and contents of the files
    models: Mapping[str, Mapping[str, Mark]]  # as the recipe names it: path in the folder -> content
    passing: tuple[str, ...]  # patterns of files that are saved while the stage is made


class Brought(NamedTuple):
    """A stage was made, and these files of it lie at the address."""

    done: Done
    files: Mapping[str, Mark]


class Named(NamedTuple):
    """Files and folders of this machine that a recipe names -> the setting that does."""

    rows: dict[str, str]
    models: dict[str, str]


def named_here(recipe: Recipe) -> Named:
    """What of this machine the nodes need. Raises RecipeError for what is neither rows nor a model."""
    named = Named({}, {})
    for name, block in recipe:
        if name not in APART:
            _collect(block, name, named)
    return named


def _collect(value: Any, setting: str, named: Named) -> None:
    if isinstance(value, Source):
        if value.path is not None and value.path not in SHIPPED:
            named.rows.setdefault(value.path, setting)
    elif isinstance(value, BaseModel):
        for name, inner in value:
            _collect(inner, f"{setting}.{name}", named)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _collect(inner, f"{setting}.{name}", named)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _collect(inner, f"{setting}.{place}", named)
    elif isinstance(value, str) and _is_here(value):
        block, _, last = setting.partition(".")
        if block in ("model", "judge", "reference") and last.split(".")[-1] == "path":
            named.models.setdefault(value, setting)
        else:
            raise RecipeError(
                f"{setting}: {value!r} is of this machine, and execution.artifacts brings models and rows alone to the nodes; "
                "leave artifacts out, with a folder that all nodes see"
            )


def _is_here(text: str) -> bool:
    """Whether a text names a file or folder of this machine, or a value in a file (`code.py:NAME`)."""
    path = text.rpartition(":")[0] if ".py:" in text else text
    return os.sep in path and len(path) < 4096 and "\0" not in path and os.path.exists(os.path.expanduser(path))


class Courier:
    """Brings files between RUN and the address, for the command that gives the stages out."""

    def __init__(self, address: str) -> None:
        self._artifacts = Artifacts(address)
        self._address = address
        self._recipes: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._marks: dict[tuple[Path, int, int], Mark] = {}

    def bundle(self, begun: Run, stage: Stage[Session]) -> Bundle:
        """Put what a stage needs. Raises RecipeError for what cannot be brought, LostError where the address does not answer."""
        folder = begun.graph.folder
        if folder not in self._recipes:
            self._recipes[folder] = self._of_recipe(begun.recipe)
        files = {path: self._put(folder / path) for path in needed_files(begun.graph, stage)}
        return Bundle(self._address, _note(begun, stage), files, *self._recipes[folder], stage.passing)

    def _of_recipe(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        named = named_here(recipe)
        rows = {
            path: tuple((file.name, self._put(file)) for file in find_files(path, setting))
            for path, setting in named.rows.items()
        }
        models: dict[str, Any] = {}
        for path in named.models:
            folder = Path(os.path.expanduser(path))
            inside = (file for file in sorted(folder.rglob("*")) if file.is_file())
            shown = [file for file in inside if not any(part[0] == "." for part in file.relative_to(folder).parts)]
            models[path] = {file.relative_to(folder).as_posix(): self._put(file) for file in shown}
        return rows, models

    def _put(self, file: Path) -> Mark:
        about = file.stat()
        known = (file, about.st_size, about.st_mtime_ns)
        if known not in self._marks:
            self._marks[known] = mark_of(file)
        return self._artifacts.put(file, self._marks[known])

    def bring(self, begun: Run, stage: Stage[Session], brought: Brought) -> Done:
        """Bring what a stage made into RUN. Raises LostError for what is not all there, whole: then nothing vouches for it."""
        for path, mark in brought.done.marks.items():
            made = brought.files.get(path)
            if made is None or made[:2] != (mark.size, mark.xxh3):
                raise LostError(f"{stage.title}: {path!r} changed while it was brought")
        self._fetch(begun.graph.folder, brought.files)
        self._artifacts.drop_note(_note(begun, stage))
        return brought.done

    def bring_states(self, begun: Run, stage: Stage[Session]) -> None:
        """Bring the states of a stage that was stopped into RUN, where any other execution goes on from them."""
        if files := saved_files(self._artifacts, _note(begun, stage)):
            self._fetch(begun.graph.folder, files)
            self._artifacts.drop_note(_note(begun, stage))

    def _fetch(self, folder: Path, files: Mapping[str, Mark]) -> None:
        for path, mark in files.items():
            if not is_inside(path):
                raise LostError(f"execution.artifacts: a node made {path!r}, which is not in the run's folder")
            self._artifacts.fetch(mark, folder / path)


def _note(begun: Run, stage: Stage[Session]) -> str:
    return fingerprint([str(begun.graph.folder), stage.name, begun.graph.key(stage.name)])[:32]


def saved_files(artifacts: Artifacts, note: str) -> dict[str, Mark]:
    """The files of a stage under way that a node noted, by their paths in RUN."""
    noted = artifacts.note(note) or {}
    return {path: Mark(*mark) for path, mark in noted.get("files", {}).items() if is_inside(path)}


def needed_files(graph: RunGraph, stage: Stage[Session]) -> list[str]:
    """Paths in RUN of what the stages before this one made, and of what a stopped making of it left."""
    before, names = {}, [*stage.needs, *stage.after]
    while names:
        name = names.pop()
        if name not in before:
            before[name] = read_stamp(graph.folder, name)
            names += [*graph.stages[name].needs, *graph.stages[name].after]
    paths = [stamp_file(graph.folder, name) for name, stamp in before.items() if stamp is not None]
    paths += [graph.folder / path for stamp in before.values() if stamp is not None for path in stamp.files]
    for pattern in stage.files:
        parent = Path(pattern).parent
        shared = parent == Path() or (parent.parts[0] == "seeds" and len(parent.parts) == 2)  # by all stages of a seed
        if not shared and not set("*?[") & set(str(parent)):
            paths += (graph.folder / parent).glob("*")
    paths += (graph.folder / pattern for pattern in stage.files)
    for pattern in stage.passing:
        for left in graph.folder.glob(pattern):
            paths += left.rglob("*") if left.is_dir() else [left]
    files = {path.relative_to(graph.folder).as_posix() for path in paths if path.is_file() and _counts(path)}
    return sorted(files)


def _counts(file: Path) -> bool:
    return not file.name.endswith(PART) and file.name not in (LOCK, HELD)


class Mirror:
    """A node's own folder in RUN's place, for one actor and one run."""

    def __init__(self) -> None:
        every = cache_folder() / "mirrors"
        every.mkdir(parents=True, exist_ok=True)
        _remove_left(every)
        self.folder = every / os.urandom(8).hex()
        self._lock = taken(every / f"{self.folder.name}.lock")
        self.folder.mkdir()
        self._laid: dict[str, tuple[Mark, tuple[int, int]]] = {}  # path -> content, and the file's size and time
        self._kept: tuple[str, Artifacts, Cache] | None = None

    @contextmanager
    def laid_out(self, bundle: Bundle) -> Iterator[None]:
        """Inside the block, all that a stage needs lies in the folder, and states are put as they are saved. Raises LostError
        where something does not come."""
        artifacts, cache = self._reach(bundle.address)
        know_copies(_copies(bundle, cache))
        files = dict(bundle.files)
        saved = saved_files(artifacts, bundle.note)
        for path in [*self._laid, *(file.relative_to(self.folder).as_posix() for file in self._files())]:
            if path not in files:
                (self.folder / path).unlink(missing_ok=True)
                self._laid.pop(path, None)
        for path, mark in files.items():
            self._lay(path, mark, cache)
        with suppress(LostError):  # what cannot be had any more is made again
            for mark in saved.values():
                cache.held(mark)
            for path, mark in saved.items():
                self._lay(path, mark, cache)
        over = threading.Event()
        saver = threading.Thread(target=self._save_on, args=(bundle, over), daemon=True)
        saver.start()
        try:
            yield
        finally:
            over.set()
            saver.join()

    def _lay(self, path: str, mark: Mark, cache: Cache) -> None:
        laid = self._laid.get(path)
        if laid is None or laid[0][:2] != mark[:2] or laid[1] != _seen(self.folder / path):
            cache.place(mark, self.folder / path)
        self._laid[path] = mark, _seen(self.folder / path)

    def put_new(self, bundle: Bundle) -> dict[str, Mark]:
        """Put every file that is not as it was laid out."""
        _, cache = self._reach(bundle.address)
        new = {}
        for file in self._files():
            path, seen = file.relative_to(self.folder).as_posix(), _seen(file)
            if path in self._laid and self._laid[path][1] == seen:
                continue
            if any(file.relative_to(self.folder).match(pattern) for pattern in bundle.passing):
                continue
            new[path] = cache.keep(file)
            self._laid[path] = new[path], seen
        return new

    def save(self, bundle: Bundle) -> None:
        """Put the states that a training saved, and note them. The log beside them is read after them: it may be longer, and is cut
        by the training that goes on, but never shorter."""
        artifacts, cache = self._reach(bundle.address)
        states = self._states(bundle)
        if not states:
            return
        marks: dict[str, Mark] = {}
        with suppress(FileNotFoundError):  # the training is done with it, or saves another
            for file in states:
                marks[file.relative_to(self.folder).as_posix()] = cache.keep(file)
            for folder in {file.parent for file in states}:
                for file in folder.glob("*.jsonl"):
                    marks[file.relative_to(self.folder).as_posix()] = cache.keep(file)
            artifacts.write_note(bundle.note, {"files": marks}, self.folder.with_suffix(".note"))

    def _save_on(self, bundle: Bundle, over: threading.Event) -> None:
        before = [(file, _seen(file)) for file in self._states(bundle)]
        while not over.wait(SAVED):
            with suppress(FileNotFoundError):
                now = [(file, _seen(file)) for file in self._states(bundle)]
                if now != before:
                    with suppress(LostError):  # the next state is put, or the stage's end tells
                        self.save(bundle)
                        before = now

    def _states(self, bundle: Bundle) -> list[Path]:
        return sorted(
            file for pattern in bundle.passing if pattern.endswith(STATE) for file in self.folder.glob(pattern)
        )

    def _files(self) -> list[Path]:
        return [file for file in sorted(self.folder.rglob("*")) if file.is_file() and _counts(file)]

    def _reach(self, address: str) -> tuple[Artifacts, Cache]:
        if self._kept is None or self._kept[0] != address:
            artifacts = Artifacts(address)
            self._kept = address, artifacts, Cache(artifacts, cache_folder() / "artifacts")
        return self._kept[1:]


def _copies(bundle: Bundle, cache: Cache) -> dict[str, tuple[Path, ...]]:
    """Where the recipe's rows and models lie on this node."""
    copies = {}
    for path, files in bundle.rows.items():
        # Each in a folder of its own: files of one name may come from several folders.
        inside = {f"{place}/{name}": mark for place, (name, mark) in enumerate(files)}
        folder = cache.tree(fingerprint([path, inside])[:32], inside)
        copies[path] = tuple(folder / name for name in inside)
    for path, content in bundle.models.items():
        name = f"{fingerprint([path, content])[:32]}/{Path(os.path.expanduser(path)).name}"
        copies[path] = (cache.tree(name, content),)
    return copies


def _seen(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def _remove_left(folder: Path) -> None:
    """Remove the mirrors of actors that are gone: nobody holds their locks."""
    for file in folder.glob("*.lock"):
        if (held := taken(file, patience=0)) is None:
            continue
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
        file.with_suffix(".note").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        held.release()
