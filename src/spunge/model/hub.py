"""The folder of a model that a recipe names: here, or downloaded from the Hub."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from spunge.errors import RecipeError
from spunge.files import alone, writing
from spunge.model.conversion import conversion, convert, refuse_untrusted
from spunge.model.loadable import check_fit
from spunge.recipe.model import ModelSettings
from spunge.weights.checkpoint import Checkpoint, model_files
from spunge.weights.hub import fetched
from spunge.weights.opening import stored_weights
from spunge.weights.quantised import quantisation


def local_folder(settings: ModelSettings, setting: str = "model.path") -> Path:
    """The folder of a model that is to be trained. `setting` names what gave it, for errors.

    Raises RecipeError where there is none, where transformers would fill some of its weights at random, and where they are
    pickled or quantised and the recipe does not say that they may be converted.
    """
    folder = fetched(settings.path, setting, settings.revision, pickles=settings.allow_pickle)
    refuse_untrusted(folder, settings, setting)
    return folder


@contextmanager
def plain_folders(given: Sequence[ModelSettings], aside: Path) -> Iterator[list[Path]]:
    """The folders of a base, which comes first, and of models, adapters or deltas. Pickled and quantised models among them are
    converted into folders below `aside`, which vanishes when the block ends.

    Raises RecipeError, before anything is written, where one is missing or must not be converted.
    """
    folders = []
    for number, settings in enumerate(given):
        setting = "--model" if number else "--base"
        folder = fetched(settings.path, setting, pickles=settings.allow_pickle)
        needed = conversion(folder, setting) if stored_weights(folder, setting).of is None else None
        if needed is not None:
            refuse_untrusted(folder, settings, setting)
        folders.append((setting, folder, aside / str(number) if needed else folder))
    with _for_conversions(aside) if any(plain != folder for _, folder, plain in folders) else nullcontext():
        for settings, (setting, folder, plain) in zip(given, folders, strict=True):
            if plain != folder:
                shutil.rmtree(plain, ignore_errors=True)  # of a merge that was killed
                convert(folder, plain, settings, setting)
                _date(plain, folder)
        yield [plain for _, _, plain in folders]


@contextmanager
def _for_conversions(aside: Path) -> Iterator[None]:
    """A folder of this process alone for the time of the block."""
    with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
    with alone(aside):
        try:
            yield
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _date(converted: Path, given: Path) -> None:
    """Give converted weights the time of those that they were made from, by which a merge of them is known again."""
    newest = max(file.stat().st_mtime_ns for file in model_files(given).files)
    for file in Checkpoint(converted).files:
        os.utime(file, ns=(newest, newest))


def judges_folder(settings: ModelSettings, setting: str) -> Path:
    """The folder of a model that judges and is never changed: it may be quantised. Raises RecipeError."""
    folder = fetched(settings.path, setting, settings.revision)
    files = model_files(folder, setting)
    if files.pickled:
        raise RecipeError(
            f"{setting}: {settings.path!r} has pickled weights alone ({files.files[0].name}), which can run code when read; "
            "convert them to safetensors"
        )
    checkpoint = Checkpoint(folder, setting)
    if quantisation(checkpoint) is None:
        check_fit(checkpoint)
    return folder
