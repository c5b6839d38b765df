"""Rows of files as they are now, or of the Hub, in an Arrow table: in memory where they are few, else mapped from the cache."""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from spunge.copies import copies_of
from spunge.data.arrays import counted
from spunge.data.arrowrows import plain_table, read_arrow
from spunge.data.decoding import COMPRESSIONS, UnreadableError, refuse_foreign
from spunge.data.hubrows import hub_table, text_files
from spunge.data.jsonrows import read_json
from spunge.data.keeping import AT_ONCE, Keeper, content_key, table_of, together
from spunge.data.kinds import TEXT, fitted, kind_of, merged
from spunge.data.tables import repeated
from spunge.data.textrows import read_csv, read_lines
from spunge.errors import RecipeError
from spunge.files import is_inside, parse_json
from spunge.recipe.rows import NEUTRAL, Source

FAMILIES = {
    "JSON": (".jsonl", ".ndjson", ".json"),
    "CSV": (".csv", ".tsv"),
    "Parquet": (".parquet",),
    "Arrow": (".arrow", ".feather"),
    "text": (".txt",),
}
FORMATS = {ending: family for family, endings in FAMILIES.items() for ending in endings}
# Rows that people have and that are not read; in a folder they are refused rather than left out without a word.
OTHERS = (
    ".xlsx",
    ".xls",
    ".ods",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".pkl",
    ".pickle",
    ".orc",
    ".avro",
    ".db",
    ".sqlite",
    ".h5",
)
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
BEGINNINGS = {"Parquet": (b"PAR1",), "Arrow": (b"ARROW1",)}
SHIPPED = {NEUTRAL: Path(__file__).parent / "neutral" / "wikitext2.jsonl"}  # what a source may name in place of a path


class Origin(NamedTuple):
    """A file, or the Hub's dataset, that some of the rows are from."""

    name: str
    first: int  # which of the table's rows is its first
    columns: frozenset[str]


@dataclass(frozen=True)
class Records:
    """Rows, and where they are from."""

    table: pa.Table
    origins: tuple[Origin, ...] = ()

    def row_name(self, row: int) -> str:
        """`row 3 of words.csv`: rows are counted from 1, without a heading and blank lines."""
        return self.row_names(np.array([row]))[0]

    def row_names(self, rows: np.ndarray) -> list[str]:
        names = [f" of {origin.name}" for origin in self.origins] or [""]
        return [
            f"row {number}{names[file]}"
            for number, file in zip(self.numbers(rows).tolist(), self.files(rows).tolist(), strict=True)
        ]

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """The rows' numbers in their files, from 1."""
        firsts = np.array([origin.first for origin in self.origins] or [0])
        return np.asarray(rows - firsts[self.files(rows)] + 1)

    def files(self, rows: np.ndarray) -> np.ndarray:
        """Which of the origins the rows are from."""
        firsts = [origin.first for origin in self.origins] or [0]
        return np.asarray(np.searchsorted(firsts, rows, side="right") - 1)


class _Piece(NamedTuple):
    """What one file gives."""

    name: str
    table: pa.Table
    reread: Callable[[Collection[str]], pa.Table]  # with these columns as text


def read_rows(sources: Sequence[Source], setting: str) -> Records:
    """All rows of all sources, one after the other; columns that a source lacks are null.

    A column that is a number in one file and text in another is text, as the files spell it. `setting` names the recipe's
    key in errors. Raises RecipeError for a missing file, an unknown or mixed format, unreadable content, or no rows.
    """
    every = [piece for source in sources for piece in _pieces(source, setting)]
    pieces = [piece for piece in every if piece.table.num_rows]
    if not pieces:
        raise RecipeError(f"{setting}: no rows in {', '.join(piece.name for piece in every[:3])}")
    kinds: dict[str, pa.DataType] = {}
    for piece in pieces:
        for field in piece.table.schema:
            kinds[field.name] = merged(kinds.get(field.name, pa.null()), field.type)
    tables, origins, first = [], [], 0
    for piece in pieces:
        schema = piece.table.schema
        clashing = [f.name for f in schema if kinds[f.name] == TEXT and f.type != TEXT and not pa.types.is_null(f.type)]
        table = piece.reread(clashing) if clashing else piece.table
        names = table.column_names
        tables.append(_alike(table, kinds))
        origins.append(Origin(piece.name, first, frozenset(names)))
        first += table.num_rows
    return Records(pa.concat_tables(tables, promote_options="default"), tuple(origins))


def _alike(table: pa.Table, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """With all of these columns, in types that hold the values of all tables; what is missing is null."""
    own = [name for name in table.column_names if table[name].type != kinds[name]]
    if own:
        pieces = (table.select(own).slice(start, AT_ONCE) for start in range(0, max(1, table.num_rows), AT_ONCE))
        cast = together(pa.table([fitted(each[name], kinds[name]) for name in own], names=own) for each in pieces)
        for name in own:
            table = table.set_column(table.column_names.index(name), name, cast[name])
    columns = [
        table[name] if name in table.column_names else repeated(pa.scalar(None, kind), table.num_rows)
        for name, kind in kinds.items()
    ]
    return pa.table(columns, names=list(kinds))


def _pieces(source: Source, setting: str) -> Iterator[_Piece]:
    texts = text_files(source, setting) if source.hub else None
    if source.hub and texts is None:
        table = _with_columns(hub_table(source, setting), source, 0, setting)
        yield _Piece(source.hub, table, lambda text: plain_table(table, sorted(text)))
        return
    if texts is not None:
        files = _of_known_formats(texts.files, f"{setting}: {source.hub!r}")
        source = source.model_copy(update={"delimiter": source.delimiter or texts.delimiter})
    else:
        files = find_files(str(source.path), setting)
    before = 0
    for file in files:
        name = file.name if [other.name for other in files].count(file.name) == 1 else str(file)

        def read(text: Collection[str], file: Path = file, first: int = before) -> pa.Table:
            return _with_columns(_of_file(file, source, text, setting), source, first, setting)

        piece = _Piece(name, read(()), read)
        before += piece.table.num_rows
        yield piece


def _of_known_formats(files: list[Path], where: str) -> list[Path]:
    if odd := [file.name for file in files if _ending(file) not in FORMATS]:
        raise RecipeError(
            f"{where}: {odd[0]!r} is of a format that is not read; download and unpack it, and give the folder"
        )
    return files


def _with_columns(table: pa.Table, source: Source, first: int, setting: str) -> pa.Table:
    """With the source's constant columns, and the numbers of its rows. first: the number of the table's first row."""
    if (number := source.row_number) is not None:
        if number in table.column_names or number in source.assign:
            raise RecipeError(f"{setting}.row_number: there is a column {number!r} already; give another name")
        table = table.append_column(number, pa.array(counted(first + table.num_rows)[first:]))
    for name, value in source.assign.items():
        column = repeated(pa.scalar(value, kind_of([value])), table.num_rows)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def _of_file(file: Path, source: Source, text: Collection[str], setting: str) -> pa.Table:
    ending, columns = _ending(file), sorted(text)

    def read(keeper: Callable[[], Keeper]) -> pa.Table:
        refuse_foreign(file, BEGINNINGS.get(FORMATS[ending], ()))
        match FORMATS[ending]:
            case "JSON":
                return read_json(file, ending, source.encoding, columns, keeper)
            case "CSV":
                return read_csv(file, ending, source.encoding, source.delimiter, keeper)
            case "text":
                return read_lines(file, source.encoding, keeper)
        return read_arrow(file, ending, columns, keeper)

    try:
        key = content_key(file, ending, file.suffix.lower(), source.encoding, source.delimiter, columns)
        return table_of(key, read)
    except UnreadableError as error:
        raise RecipeError(f"{setting}: {str(file)!r} cannot be read: {error}") from None
    except OSError as error:
        raise RecipeError(f"{setting}: {str(file)!r} cannot be read: {error.strerror}") from None


def find_files(path: str, setting: str) -> list[Path]:
    """The data files behind a path: one file, a folder's, or a glob's, sorted, hidden ones left out. A path that exists is that
    path, whatever signs are in it.

    Raises RecipeError when there are none, and for files of formats that are not read or do not go together.
    """
    if (copies := copies_of(path)) is not None:
        return list(copies)
    whole = Path(path)
    if path in SHIPPED:
        return [SHIPPED[path]]
    if URL.match(path):
        raise RecipeError(
            f"{setting}: {path!r} is a URL; give a file that is here, or {{hub: ID}} for a dataset of the Hub"
        )
    if os.path.isfile(whole):
        files = [whole]
    elif os.path.isdir(whole) and (saved := _saved_dataset(whole, setting)):
        files = saved
    elif os.path.isdir(whole):
        inside = (file for file in whole.rglob("*") if os.path.isfile(file))
        files = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(whole).parts)]
    else:
        files = [file for file in map(Path, glob.glob(_pattern(whole), recursive=True)) if os.path.isfile(file)]
    for file in sorted(files):
        if _ending(file) in OTHERS or (file == whole and _ending(file) not in FORMATS):
            mend = "save it as CSV" if _ending(file) in (".xlsx", ".xls", ".ods") else f"known: {', '.join(FORMATS)}"
            raise RecipeError(f"{setting}: {str(file)!r}: unknown format {_ending(file)!r}; {mend}")
    files = sorted(file for file in files if _ending(file) in FORMATS)
    if not files:
        kind = "folder without data files" if os.path.isdir(whole) else "no such file, folder or match"
        hub = "" if os.path.isdir(whole) or whole.suffix else "; a dataset of the Hub is {hub: ID}"
        raise RecipeError(f"{setting}: {kind}: {path!r}{hub}; known formats: {', '.join(FORMATS)}")
    if len({FORMATS[_ending(file)] for file in files}) > 1:
        endings = ", ".join(sorted({_ending(file) for file in files}))
        raise RecipeError(f"{setting}: files of several formats ({endings}); give them as a list of sources")
    return files


def _saved_dataset(folder: Path, setting: str) -> list[Path]:
    """The files of a dataset that `datasets` saved to a folder: those that its state.json lists, as others may be left there from
    its cache. None where it is no such folder. Raises RecipeError for several splits."""
    if (splits := folder / "dataset_dict.json").is_file():
        names = _of_state(splits, "splits", setting)
        if len(names) != 1:
            raise RecipeError(f"{setting}: {str(folder)!r} holds the splits {', '.join(names)}; name the folder of one")
        folder = folder / names[0]
    if not (state := folder / "state.json").is_file():
        return []
    return [folder / name for name in _of_state(state, "_data_files", setting)]


def _of_state(file: Path, key: str, setting: str) -> list[str]:
    """The names of files or folders that are listed there."""
    try:
        listed = parse_json(file.read_bytes())[key]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in listed]
        if not isinstance(listed, list) or not all(map(is_inside, names)):
            raise ValueError("no names in the folder")
    except (OSError, ValueError, LookupError, TypeError):
        raise RecipeError(f"{setting}: {str(file)!r} does not say what a saved dataset holds; name its files") from None
    return names


def _pattern(path: Path) -> str:
    """The path as a glob, in which the folders that exist as they are written stand for themselves."""
    start = next(parent for parent in path.parents if os.path.isdir(parent))
    return str(Path(glob.escape(str(start))) / path.relative_to(start))


def _ending(file: Path) -> str:
    """The ending that tells the format: `.csv` of words.csv.gz."""
    endings = [ending.lower() for ending in file.suffixes]
    return next((ending for ending in reversed(endings) if ending not in COMPRESSIONS), "")
