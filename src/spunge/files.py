"""Files and folders that appear whole or not at all, the hash that says whether they are the right ones, the lock, the cache."""

import ast
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from spunge.errors import RecipeError, one_line

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = ".lock"
HELD = ".lock-held"  # what stands for a lock where the file system has none
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PART = ".part"  # the end of the name of what is not whole yet
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (*FULL, errno.EROFS, errno.EFBIG)  # errors that reading never gives

CHECK = "check"  # the key of a sealed value's own checksum


def fingerprint(value: Any) -> str:
    """sha256 of a value's canonical JSON: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


@contextmanager
def written(file: Path, setting: str = "--out") -> Iterator[Path]:
    """A path to write to: what the block leaves there becomes `file` when the block ends, and vanishes when it fails.

    It is on the disk before it has its name, and has the mode that the user's other files get, whatever the library that
    writes it asks for. setting: what says where to write, for errors. Raises RecipeError when the folder cannot be written
    or the disk is full.
    """
    aside = file.with_name(f"{file.name}.{os.urandom(4).hex()}{PART}")
    try:
        with writing(file, setting):
            file.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb"):
                mode = stat.S_IMODE(aside.stat().st_mode)
            yield aside
            if stat.S_IMODE(aside.stat().st_mode) != mode:
                aside.chmod(mode)
            _sync(aside)
            os.replace(aside, file)
            _sync(file.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(file: Path, text: str, setting: str = "--out") -> None:
    """A text file, whole or not at all; see `written`."""
    with written(file, setting) as aside:
        aside.write_text(text, encoding="utf-8")


def append_text(file: Path, text: str) -> None:
    """Add to a text file that grows while work goes on. Raises RecipeError as `written` does."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)


def copied(source: Path, file: Path) -> Path:
    """A copy of a file, whole or not at all; see `written`."""
    with written(file) as aside:
        shutil.copyfile(source, aside)
    return file


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(folder: Path, setting: str = "--out", replace: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends, and vanishes when it fails.

    `folder` must be absent or empty, unless it may be replaced. Raises RecipeError when the disk cannot take it.
    """
    aside = folder.with_name(f".{folder.name}{PART}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(folder, setting):
            aside.mkdir(parents=True)
        with disk_errors_told(aside):  # the block may read as well
            yield aside
        with writing(folder, setting):
            if folder.exists() and not replace:
                folder.rmdir()  # only an empty one goes
            put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """Let a finished folder have its name, its content on the disk before. What had the name goes when the new one has it."""
    for path in (aside, *aside.rglob("*")):
        _sync(path)
    clear_replaced(folder)
    if folder.exists():
        os.rename(folder, _replaced(folder))
    os.rename(aside, folder)
    _sync(folder.parent)
    clear_replaced(folder)


def clear_replaced(folder: Path) -> None:
    """Remove what had the name of a finished folder before: a process that was killed may have left it."""
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk: a rename may get there before what was renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with about(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such thing for folders
            raise
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Inside the block, no other process can be in a block of the same folder; what a killed one left unfinished is removed.

    patience: seconds that another process is waited for. Raises RecipeError where one is in a block still, and where a link in
    the folder leads out of it: what is written or removed there would be another's. On a file system without locks a file
    stands for the lock, and that is said: its holder is known by machine and process, so that one that was killed on this
    machine holds nothing.
    """
    refuse_links(folder)
    lock = _acquired(folder, patience)
    try:
        for left in list(folder.rglob(f"*{PART}")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # it goes with the process
            lock.release()


def _acquired(folder: Path, patience: float) -> "BaseFileLock":
    from filelock import FileLock, SoftFileLock, Timeout

    busy = f"--out: another process is at work in {str(folder)!r}; wait for it, or give another folder"
    lock: BaseFileLock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=patience)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            said = f"the file system of {str(folder)!r} has no locks; the file {HELD} in it stands for one"
            logging.getLogger("spunge").warning(one_line(said))
            busy += f" (if there is none, remove {HELD} in it)"
            lock = SoftFileLock(folder / HELD)
            # The first try only takes away what a killed process left.
            lock.acquire(timeout=max(1.0, patience), poll_interval=0.1)
    except Timeout:  # which is an OSError
        raise RecipeError(busy) from None
    except OSError as error:
        raise unwritable(folder / LOCK, error) from error
    return lock


def taken(file: Path, patience: float = -1.0) -> "BaseFileLock | None":
    """A lock that other processes of this machine ask for by the same file, taken until it is released or the process ends.

    patience: seconds to wait for who holds it, or -1 to wait until it is free; None where it stayed another's.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        return None
    return lock


def given_name(aside: Path | str, file: Path | str) -> None:
    """Let a whole file have its name, in one step, over what had it. A power cut may lose it: for what is checked when read."""
    os.replace(aside, file)


def refuse_links(folder: Path) -> None:
    """Raises RecipeError for a folder that is a link, or in which one leads out of it."""
    root = folder.parent.resolve() / folder.name
    links = [root] if root.is_symlink() else []
    for where, folders, files in os.walk(root):
        links += [link for name in (*folders, *files) if (link := Path(where, name)).is_symlink()]
    for link in links:
        if not link.resolve().is_relative_to(root) or link == root:
            raise RecipeError(
                f"--out: {str(link)!r} is a link that leads out of the folder, and what is written there would be another's; "
                "take it away, or give another folder"
            )


def cache_folder() -> Path:
    """What is kept across runs: the folder that SPUNGE_CACHE names, by default spunge in the user's cache folder."""
    given = os.environ.get("SPUNGE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spunge"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that others may have written. Raises ValueError for what is none, also for what is nested too
    deeply and for numbers of thousands of digits."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def python_literal(text: str) -> Any:
    """The value of a Python literal, as data frames write lists into CSV. Raises ValueError for any other text."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"no literal of Python ({type(error).__name__})") from None


def read_json(file: Path) -> Any:
    """The file's value, or None where there is no such file or it is cut short."""
    try:
        return parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None


def is_inside(name: object) -> bool:
    """Whether a name that stands in a file leads to something in that file's folder, on every system."""
    if not isinstance(name, str) or not name or name.startswith(("/", "\\")) or "\0" in name:
        return False
    parts = re.split(r"[/\\]", name)
    return ".." not in parts and set(parts) != {"."} and ":" not in parts[0]


def is_device(name: str) -> bool:
    """Whether Windows takes a file of that name, whatever its ending, for a device."""
    return re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9]", name.split(".")[0].strip().lower()) is not None


def checksum(file: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, read in pieces. It tells damage, not forgery."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a checksum of itself, so that a file that holds it vouches for itself."""
    return {**value, CHECK: xxhash.xxh3_64_hexdigest(_canonical(value))}


def unsealed(value: Any) -> dict[str, Any] | None:
    """What was sealed; None for anything else, and for what was changed since."""
    if not isinstance(value, dict) or CHECK not in value:
        return None
    content = {key: inner for key, inner in value.items() if key != CHECK}
    return content if value[CHECK] == xxhash.xxh3_64_hexdigest(_canonical(content)) else None


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


@contextmanager
def writing(path: Path, setting: str = "--out") -> Iterator[None]:
    """What the system refuses inside the block, which does nothing but write `path`, is told as that."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if (refused := system_error(error)) is None:
            raise
        raise unwritable(path, refused, setting) from error


def system_error(error: BaseException | None) -> OSError | None:
    """The system's error that is one, or stands behind one of a library: torch raises another while it handles it,
    safetensors gives its text alone, "... (os error 28)"."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(match[1]), os.strerror(int(match[1])))
        error = error.__context__
    return None


def unwritable(path: Path, error: OSError, setting: str = "--out") -> RecipeError:
    """The one-line error for a disk that is full or a folder that cannot be written."""
    if error.errno in FULL:
        return RecipeError(
            f"{setting}: the disk that holds {str(path.parent)!r} is full; free some space or give another folder"
        )
    return RecipeError(f"{setting}: cannot write {str(path)!r} ({error.strerror or error}); give another folder")


def require_space(folder: Path, nbytes: float, what: str, setting: str = "--out") -> None:
    """Raises RecipeError where the disk that holds `folder`, or is to hold it, has no room for so many bytes of `what`."""
    free = free_space(folder)
    if nbytes > free:
        there = _there(folder)
        raise RecipeError(
            f"{setting}: {what} takes {shown_size(nbytes)}, and the disk that holds {str(there)!r} has {shown_size(free)} "
            "free; free some space or give another folder"
        )


def free_space(folder: Path) -> int:
    """Bytes that the disk has free that holds `folder`, or is to hold it."""
    return shutil.disk_usage(_there(folder)).free


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def shown_size(nbytes: float) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


@contextmanager
def disk_errors_told(folder: Path) -> Iterator[None]:
    """Errors of the disk inside the block, which writes into `folder`, become one line where nobody nearer has told them."""
    try:
        yield
    except OSError as error:
        named = file_of(error)
        if error.errno in NOT_WRITABLE:
            raise unwritable(named or folder / "file", error) from error
        if named is None or error.errno is None:
            raise  # of a library or the network
        if named.is_relative_to(folder):
            raise RecipeError(f"--out: cannot use {str(named)!r} ({error.strerror}); give another folder") from error
        raise RecipeError(f"cannot read {str(named)!r} ({error.strerror})") from error


@contextmanager
def about(file: Path) -> Iterator[None]:
    """What the system refuses inside the block without saying of which file is told of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def file_of(error: OSError) -> Path | None:
    """The file that an error of the system is about. Reading and writing do not say which: then it is the open file nearest to
    where the error came up."""
    for name in (error.filename2, error.filename):  # of a copy, the first is read and the second written
        if isinstance(name, str | bytes):
            return Path(os.fsdecode(name))
    frames = [frame for frame, _line in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, io.TextIOWrapper | io.BufferedReader | io.BufferedWriter | io.FileIO):
                with contextlib.suppress(AttributeError):  # of a stream that is over no file
                    if isinstance(value.name, str | bytes):
                        return Path(os.fsdecode(value.name))
    return None
