"""Read rows from files or the Hub into an Arrow table (memory-mapped by `datasets`), never as Python objects."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from spunge.errors import RecipeError, suggestion
from spunge.recipe.schema import Source

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


def read_rows(sources: Sequence[Source], setting: str) -> pa.Table:
    """All rows of all sources, one after the other; columns that a source lacks are null.

    `setting` names the recipe's key in errors. Raises RecipeError for a missing file, an unknown or mixed format,
    unreadable content, or no rows.
    """
    tables = [_read(source, setting) for source in sources]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{setting}: the sources' columns do not fit together ({error})") from None
    if not table.num_rows:
        raise RecipeError(f"{setting}: no rows in {', '.join(str(source.path or source.hub) for source in sources)}")
    return table


def _read(source: Source, setting: str) -> pa.Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.hub:
            loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
        else:
            files = find_files(str(source.path), setting)
            loaded = datasets.load_dataset(
                _reader(files, setting), data_files=[str(file) for file in files], split="train"
            )
    except RecipeError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise RecipeError(f"{setting}: {source.path or source.hub!r} cannot be read: {reason}") from error
    table: pa.Table = loaded.data.table
    for name, value in source.assign.items():
        column = pa.repeat(pa.scalar(value), table.num_rows)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def find_files(path: str, setting: str) -> list[Path]:
    """The data files behind a path: one file, a folder's, or a glob's, sorted. Raises RecipeError when there are none."""
    place = Path(path)
    if place.is_file():
        return [place]
    found = place.rglob("*") if place.is_dir() else map(Path, glob.glob(path, recursive=True))
    files = sorted(file for file in found if file.is_file() and _format(file) in READERS)
    if not files:
        kind = "folder without data files" if place.is_dir() else "file, folder or match"
        raise RecipeError(f"{setting}: no such {kind}: {path!r}; known formats: {', '.join(READERS)}")
    return files


def _format(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _reader(files: Sequence[Path], setting: str) -> str:
    formats = {_format(file) for file in files}
    unknown = formats - READERS.keys()
    if unknown:
        raise RecipeError(f"{setting}: {str(files[0])!r}: unknown format; known: {', '.join(READERS)}")
    readers = {READERS[name] for name in formats}
    if len(readers) > 1:
        raise RecipeError(
            f"{setting}: files of several formats ({', '.join(sorted(formats))}); give them as a list of sources"
        )
    return readers.pop()


def require_columns(table: pa.Table, columns: Mapping[str, str], setting: str) -> None:
    """Raises RecipeError, with the nearest name, for a column that the table lacks."""
    for role, name in columns.items():
        if name not in table.column_names:
            raise RecipeError(f"{setting}.{role}: no column {name!r}{suggestion(name, table.column_names)}")


def text_columns(table: pa.Table, columns: Mapping[str, str], setting: str) -> pa.Table:
    """The text columns alone, renamed to their roles (text, prompt, completion, messages).

    Raises RecipeError for a column that is not there, is no text, or has an empty text.
    """
    require_columns(table, columns, setting)
    chosen: dict[str, Any] = {}
    for role, name in columns.items():
        column = table[name]
        conversations = role == "messages" or (role != "text" and pa.types.is_nested(column.type))
        if not conversations:  # what those hold is read later, row by row
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise RecipeError(f"{setting}.{role}: column {name!r} holds {column.type}, not text")
            if role != "prompt":
                _refuse_empty(column, f"{setting}.{role}: column {name!r}", name)
        chosen[role] = column
    return pa.table(chosen)


def _refuse_empty(column: pa.ChunkedArray, what: str, name: str) -> None:
    import pyarrow.compute as pc

    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
    empty = pc.sum(blank).as_py() or 0
    if empty:
        first = pc.index(blank, True).as_py()
        raise RecipeError(
            f"{what} is empty in {empty} of {len(column)} rows (first: row {first} of those chosen); "
            f"filter them out with where: \"trim({name}) <> ''\""
        )
