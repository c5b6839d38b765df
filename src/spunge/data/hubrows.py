"""Rows of the Hub: its text files are downloaded and read as files here are, any other dataset by the library `datasets`.

That library reads CSV through pandas, where the word NA is nothing, 007 is 7 and a date no text; the same file should not give
other rows for where it lies.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from spunge.data.arrowrows import plain_table
from spunge.data.keeping import AT_ONCE, together
from spunge.data.kinds import plain_kind
from spunge.errors import RecipeError
from spunge.recipe.rows import Source

_ADDRESS = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_TEXTS = re.compile(r"datasets\.packaged_modules\.(csv|json|text)\.\w+")
# Settings of a dataset's card that change nothing of how its files are read here.
_ASIDE = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "encoding")


class TextFiles(NamedTuple):
    files: list[Path]
    delimiter: str | None  # of CSV, where the dataset's card names one


def text_files(source: Source, setting: str) -> TextFiles | None:
    """The files of a dataset that is made of CSV, JSON or plain text; None of any other. Raises RecipeError."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(source.hub), source.config, revision=source.revision)
    except Exception as error:
        raise unreadable(source, setting, error) from error
    if not _TEXTS.match(type(builder).__module__) or not builder.config.data_files:
        return None
    files = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    if source.split not in files:
        raise RecipeError(
            f"{setting}: {source.hub!r} has no split {source.split!r}; known: {', '.join(files)} (a part of one is drawn by limit)"
        )
    if others := sorted(_options(builder.config)):
        raise RecipeError(
            f"{setting}: {source.hub!r} sets {others[0]} in its card, which is not read; download the files, give the folder"
        )
    try:
        here = [_downloaded(str(path)) for path in files[source.split]]
    except Exception as error:
        raise unreadable(source, setting, error) from error
    mark = getattr(builder.config, "delimiter", None) or getattr(builder.config, "sep", None)
    return TextFiles(here, None if mark == "," else mark)


def hub_table(source: Source, setting: str) -> pa.Table:
    """The rows of any other dataset. Raises RecipeError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
        table = loaded.data.table
        if all(plain_kind(field.type) == field.type for field in table.schema):
            return plain_table(table)
        pieces = (table.slice(start, AT_ONCE) for start in range(0, max(1, table.num_rows), AT_ONCE))
        return together(map(plain_table, pieces))  # what is cast is no longer in the library's files
    except Exception as error:
        raise unreadable(source, setting, error) from error


def unreadable(source: Source, setting: str, error: Exception) -> RecipeError:
    """Whatever the library or the network objects to, in its first line."""
    cause = error.__cause__ or error
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return RecipeError(f"{setting}: {source.hub!r} cannot be read: {reason}")


def _options(config: Any) -> Iterator[str]:
    """What a dataset's card sets otherwise than the library does, of how files are read."""
    usual = type(config)()
    for field in dataclasses.fields(config):
        if field.name not in _ASIDE and getattr(config, field.name) != getattr(usual, field.name):
            yield field.name


def _downloaded(address: str) -> Path:
    """The file at an address of the Hub, in its cache; a path of this machine is that file."""
    from huggingface_hub import hf_hub_download

    match = _ADDRESS.fullmatch(address)
    if match is None:
        return Path(address)
    revision = unquote(match["revision"])
    return Path(hf_hub_download(match["id"], match["path"], repo_type="dataset", revision=revision))
