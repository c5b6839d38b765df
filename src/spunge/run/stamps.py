"""Stamps: what a stage was made from and a checksum of every file it made, written last.

RUN/stamps/STAGE.json vouches for the stage's files. What it does not vouch for is made again; no file of a run's folder is
trusted because it is there. The stamp holds a checksum of itself too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from spunge.errors import RecipeError
from spunge.files import checksum, is_inside, read_json, sealed, unsealed, write_json
from spunge.results import FILE, run_folder

FORMAT = 1


@dataclass(frozen=True)
class FileMark:
    size: Annotated[int, Field(ge=0)]  # bytes
    xxh3: str
    byproduct: bool = False  # such as a log: its damage is told, and nothing is made again for it


@dataclass(frozen=True)
class Stamp:
    stage: str
    key: str
    inputs: Mapping[str, Any]  # what the key is made of: name -> value or fingerprint
    files: Mapping[str, FileMark]  # path relative to RUN -> its mark
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # that making it took in this folder
    dropped: tuple[str, ...] = ()  # files with texts that it made and that were removed since, see run.texts
    taken: str = ""  # the run's folder that it was taken from, as people read it; "": made here

    @property
    def size(self) -> int:
        return sum(mark.size for mark in self.files.values())


def stamp_file(folder: Path, stage: str) -> Path:
    """`branch:europe` -> RUN/stamps/branch/europe.json"""
    return folder / "stamps" / f"{stage.replace(':', '/')}.json"


def marks_of(folder: Path, files: Sequence[Path], byproducts: Sequence[Path] = ()) -> dict[str, FileMark]:
    """What a stamp says of files that are whole. Paths are absolute and lie in `folder`."""
    return {
        file.relative_to(folder).as_posix(): FileMark(file.stat().st_size, checksum(file), file in byproducts)
        for file in sorted({*files, *byproducts})
    }


def store_stamp(folder: Path, stamp: Stamp) -> Stamp:
    write_json(stamp_file(folder, stamp.stage), sealed({"format": FORMAT, **asdict(stamp)}))
    return stamp


def read_stamp(folder: Path, stage: str) -> Stamp | None:
    """A stage's stamp; None where there is none, or a damaged one, or one of another format."""
    content = unsealed(read_json(stamp_file(folder, stage)))
    if content is None or content.pop("format", None) != FORMAT:
        return None
    try:
        stamp = _reader().validate_python(content)
    except ValidationError:
        return None
    # What a stamp names may be removed.
    return stamp if stamp.stage == stage and all(map(is_inside, stamp.files)) else None


@cache
def _reader() -> TypeAdapter[Stamp]:
    return TypeAdapter(Stamp)


def stamps_in(folder: Path) -> Iterator[Stamp]:
    """Every whole stamp of a run's folder, also of stages that its recipe no longer asks for."""
    root = folder / "stamps"
    for file in sorted(root.rglob("*.json")):
        name = file.relative_to(root).with_suffix("").as_posix()
        # The first slashes stand for the colons of `seed-1:control:random/random-1`.
        for colons in range(name.count("/") + 1):
            if (stamp := read_stamp(folder, name.replace("/", ":", colons))) is not None:
                yield stamp
                break


class Fault(NamedTuple):
    """A file that is not as it was written."""

    path: str  # relative to RUN
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def faults(folder: Path, stamp: Stamp, byproducts: bool) -> Iterator[Fault]:
    """What is wrong with the files that a stamp vouches for. Reads every byte of them."""
    for path, mark in stamp.files.items():
        if mark.byproduct == byproducts and (problem := _problem(folder / path, mark)):
            yield Fault(path, problem)


def _problem(file: Path, mark: FileMark) -> str:
    if file.is_dir():
        return "is a folder"
    if not file.exists():
        return "is missing"
    if file.stat().st_size != mark.size:
        return f"has {file.stat().st_size} bytes, not {mark.size}"
    try:
        return "" if checksum(file) == mark.xxh3 else "is damaged or was changed"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def other_making(folder: Path, stamps: dict[str, Stamp], last: str) -> Iterator[str]:
    """Stages that `last` was made from and that are missing, or were made again since."""
    for name, key in stamps[last].inputs.items():
        if not name.startswith("stage "):
            continue
        stage = name.removeprefix("stage ")
        file = stamp_file(folder, stage).relative_to(folder).as_posix()
        if read_stamp(folder, stage) is None:
            if not (folder / file).exists():
                yield f"{file} is missing"
        elif stamps[stage].key != key:
            yield f"{file} is of another making than what {last} was made from"


def doubts(folder: str | Path) -> str:
    """Why the results of a run's folder may not be of what lies there now; nothing where they are, and where no stamps lie beside
    them. Raises RecipeError where they are not as the run wrote them."""
    folder = run_folder(Path(folder).resolve())
    if not (folder / "stamps").is_dir():
        return ""
    stamps = {stamp.stage: stamp for stamp in stamps_in(folder)}
    again = "the run's command, given again, makes it anew"
    if "results" not in stamps:
        return f"{FILE} is of before: the run was not finished since; {again}"
    for fault in faults(folder, stamps["results"], byproducts=False):
        size = fault.problem.startswith("has ")
        told = f"is damaged: it {fault.problem}" if size else fault.problem
        raise RecipeError(f"{str(folder / fault.path)!r} {told}; {again}")
    others = list(other_making(folder, stamps, "results"))
    return f"{FILE} is of before: {others[0]}; {again}" if others else ""
