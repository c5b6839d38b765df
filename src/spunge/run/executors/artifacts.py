"""Files that travel between machines through an fsspec address, each known by its content.

ADDRESS/objects/XX/XXH3-SIZE holds bytes, ADDRESS/notes/NAME.json small JSON. An object is only believed where its size and
checksum are those that its reader was told. What a machine fetched, its processes share in a cache.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from spunge.errors import LostError, RecipeError, first_line
from spunge.files import PART, checksum, given_name, parse_json, sealed, taken, unsealed, written
from spunge.merging.copying import share

TRIES = 3  # how often an object is fetched that comes short, damaged or not at all
LINKED = (".safetensors", ".pt", ".bin")  # files that are replaced and never written into: a second name will do
SECRET = re.compile(r"//[^/@]*:[^/@]*@")


class Mark(NamedTuple):
    """By what a file's content is known; and its time, which merges go by."""

    size: int  # bytes
    xxh3: str
    time: int  # ns

    @property
    def name(self) -> str:
        return f"objects/{self.xxh3[:2]}/{self.xxh3}-{self.size}"


def mark_of(file: Path) -> Mark:
    about = file.stat()
    return Mark(about.st_size, checksum(file), about.st_mtime_ns)


def is_whole(file: Path, mark: Mark) -> bool:
    return file.is_file() and file.stat().st_size == mark.size and checksum(file) == mark.xxh3


def refuse_address(address: str) -> None:
    """Raises RecipeError for an address with a password in it, of no known kind, or whose package is not installed."""
    import fsspec
    from fsspec.core import split_protocol

    setting = "execution.artifacts"
    if SECRET.search(address):
        raise RecipeError(
            f"{setting}: the address holds a password; leave it out, and give it by the environment, as fsspec reads it"
        )
    protocol = split_protocol(address)[0]
    if protocol is None:
        raise RecipeError(
            f"{setting}: {address!r} is no address; give one such as s3://bucket/folder or file:///folder"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        mend = "pip install 'spunge[s3]'" if protocol in ("s3", "s3a") else "give an address that fsspec knows"
        raise RecipeError(f"{setting}: {address!r}: {first_line(error)}; {mend}") from None


class _NotWholeError(Exception):
    """What came is not what was asked for."""


class Artifacts:
    """What lies at an address. What goes wrong there is a LostError: another try may go well."""

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        with _reaching(address):
            self._files, self._root = url_to_fs(address, use_listings_cache=False)
        self._address = address
        self._local = isinstance(self._files, LocalFileSystem)
        self._whole: set[str] = set()  # objects that this process knows to be there

    def put(self, file: Path, mark: Mark | None = None) -> Mark:
        """Have a file's content at the address. What is there in its full size is not sent again."""
        mark = mark or mark_of(file)
        if mark.name not in self._whole:
            with _reaching(self._address):
                if self._size(mark.name) != mark.size:
                    self._send(file, mark.name)
            self._whole.add(mark.name)
        return mark

    def fetch(self, mark: Mark, file: Path) -> None:
        """Write an object to a file, whole or not at all. Raises LostError where it does not come whole.

        What is damaged there is removed, so that whoever has it puts it anew.
        """
        why = ""
        for _ in range(TRIES):
            with suppress(_NotWholeError), written(file) as aside:
                if why := self._fetched(mark, aside):
                    raise _NotWholeError
                os.utime(aside, ns=(mark.time, mark.time))
            if not why:
                return
        self._whole.discard(mark.name)
        if why.startswith("it "):
            with suppress(Exception):
                self._files.rm_file(self._at(mark.name))
        raise LostError(
            f"execution.artifacts: {self._address}: {mark.name} for {file.name!r} does not come whole ({why})"
        )

    def _fetched(self, mark: Mark, file: Path) -> str:
        """Why an object did not come whole; nothing where it did."""
        try:
            self._files.get_file(self._at(mark.name), str(file))
        except Exception as error:
            return first_line(error) or type(error).__name__
        if (size := file.stat().st_size) != mark.size:
            return f"it has {size} bytes, not {mark.size}"
        return "" if checksum(file) == mark.xxh3 else "it is damaged"

    def note(self, name: str) -> dict[str, Any] | None:
        """What was noted under a name; None where nothing was, or not whole."""
        with _reaching(self._address):
            try:
                content = self._files.cat_file(self._at(f"notes/{name}.json"))
            except FileNotFoundError:
                return None
        try:
            return unsealed(parse_json(content))
        except ValueError:
            return None

    def write_note(self, name: str, content: Mapping[str, Any], aside: Path) -> None:
        """Note JSON under a name, in place of what was noted. aside: a file to write it to on its way."""
        aside.write_text(json.dumps(sealed(content)), encoding="utf-8")
        with _reaching(self._address):
            self._send(aside, f"notes/{name}.json")

    def drop_note(self, name: str) -> None:
        with _reaching(self._address), suppress(FileNotFoundError):
            self._files.rm_file(self._at(f"notes/{name}.json"))

    def _send(self, file: Path, name: str) -> None:
        """An object store shows an object once it is whole; a disk needs another name for what is on its way."""
        target = self._at(name)
        if not self._local:
            self._files.put_file(str(file), target)
            return
        aside = f"{target}.{os.urandom(4).hex()}{PART}"
        self._files.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(file, aside)
        given_name(aside, target)

    def _size(self, name: str) -> int:
        try:
            return int(self._files.info(self._at(name))["size"])
        except FileNotFoundError:
            return -1

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class Cache:
    """What a machine fetched of an address, in a folder that its processes share: each object is fetched once."""

    def __init__(self, artifacts: Artifacts, folder: Path) -> None:
        self._artifacts, self._folder = artifacts, folder
        self._checked: set[str] = set()

    def place(self, mark: Mark, file: Path) -> None:
        """Have an object under a file's name: a second name of the cache's, or a copy where it may be written into."""
        held = self.held(mark)
        file.parent.mkdir(parents=True, exist_ok=True)
        _second(held, file)
        os.utime(file, ns=(mark.time, mark.time))

    def keep(self, file: Path) -> Mark:
        """Put a file that may change meanwhile: as it is at one moment. It stays in the cache."""
        aside = self._folder / f"{os.urandom(8).hex()}{PART}"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            _second(file, aside)
            mark = mark_of(aside)._replace(time=file.stat().st_mtime_ns)
            self._artifacts.put(aside, mark)
            held = self._folder / mark.name
            held.parent.mkdir(parents=True, exist_ok=True)
            given_name(aside, held)
        finally:
            aside.unlink(missing_ok=True)
        self._checked.add(mark.name)
        return mark

    def tree(self, name: str, files: Mapping[str, Mark]) -> Path:
        """A folder of these files, by their paths in it. name: of the folder, unique for its content."""
        folder = self._folder / "folders" / name
        with self._alone(f"folders/{name}"):
            for path, mark in files.items() if name not in self._checked else ():
                if not is_whole(folder / path, mark):  # else another process may be reading it
                    self.place(mark, folder / path)
        self._checked.add(name)
        return folder

    def held(self, mark: Mark) -> Path:
        """An object in the cache, whole: this process reads each once to know that."""
        held = self._folder / mark.name
        if mark.name in self._checked and held.exists():
            return held
        with self._alone(mark.name):
            if not is_whole(held, mark):
                self._artifacts.fetch(mark, held)
        self._checked.add(mark.name)
        return held

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Inside the block, no other process of this machine fetches the same."""
        lock = self._folder / "locks" / f"{name.replace('/', '-')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = taken(lock)
        try:
            yield
        finally:
            if held is not None:
                held.release()


def _second(source: Path, target: Path) -> None:
    if target.suffix in LINKED or source.suffix in LINKED:
        share(source, target)
    else:
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    try:
        yield
    except (LostError, RecipeError):
        raise
    except Exception as error:
        raise LostError(f"execution.artifacts: {address}: {type(error).__name__}: {first_line(error)}") from error
