"""What a merged folder holds beside its weights, copies from the base's folder and the index, and the check of the whole."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from spunge.errors import RecipeError
from spunge.files import write_json
from spunge.merging.copying import copy_file
from spunge.model.loadable import check_fit
from spunge.weights.checkpoint import Checkpoint, model_files, read_object
from spunge.weights.folder import copied
from spunge.weights.header import TensorInfo, read_header
from spunge.weights.rounding import main_dtype


def refuse_own(out: Path, read: Iterable[Path]) -> None:
    """Raises RecipeError where a merge into `out` would replace a folder that it reads."""
    place = out.resolve()
    for folder in read:
        if not folder.is_dir():
            continue  # a Hub id
        if place == folder.resolve() or place in folder.resolve().parents:
            raise RecipeError(f"--out: {str(out)!r} holds {str(folder)!r}, which the merge reads; give another folder")


def copy_rest(base: Path, target: Path, out: Path) -> None:
    """Copy what is no weights into the folder `target`, which will be `out`."""
    for inside in copied(base, out):
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        copy_file(base / inside, target / inside)


def write_index(base: Path, target: Path) -> None:
    """The index of a merged folder, made from its own files; none where the base has none."""
    chosen = model_files(base)
    if chosen.index is None:
        return
    files = [file.relative_to(base) for file in chosen.files]
    infos = {info.name: (str(file), info) for file in files for info in read_header(target / file, "--out")}
    metadata = read_object(chosen.index, "--base").get("metadata")
    size = sum(info.stop - info.start for _, info in infos.values())
    content = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        "weight_map": {name: infos[name][0] for name in sorted(infos)},
    }
    write_json(target / chosen.index.relative_to(base), content)


def check_folder(target: Path, base: Path, wanted: Mapping[str, TensorInfo]) -> str:
    """That transformers loads from a finished folder what was meant: these tensors, by name, dtype, shape and file, and no
    others. `wanted`: with the files of the base's folder, for those of the same name in `target`.

    Reads headers alone. Returns what was found, a sentence; raises RecipeError where it would load something else.
    """
    merged = Checkpoint(target, "--out")
    expected, there = (
        {name: (info.dtype, info.shape, str(info.file.relative_to(folder))) for name, info in infos.items()}
        for folder, infos in ((base, wanted), (target, merged.tensors))
    )
    if odd := sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name)):
        raise RecipeError(
            f"--out: the merged folder would not be loaded as it was merged: {odd[0]!r} would be {there.get(odd[0])}, not "
            f"{expected.get(odd[0])}; this is a fault of spunge, please report it"
        )
    loading = check_fit(merged)
    if loading.architecture is None:
        return f"the files hold what was merged; they were not tried on config.json ({loading.reason})"
    said = f"transformers loads the {len(there)} merged and copied tensors as {loading.architecture}"
    stored, asked = main_dtype(merged), loading.dtype
    if asked is None or asked.itemsize >= stored.itemsize:
        return said
    names = [str(each).removeprefix("torch.") for each in (asked, stored)]
    return f"{said}, in {names[0]} as config.json says; that rounds them, for they are stored in {names[1]}"
