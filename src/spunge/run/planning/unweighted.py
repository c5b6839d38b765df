"""A model's folder that holds a configuration and no weights: planned as if files of the configuration's shapes lay there."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spunge.errors import RecipeError
from spunge.model.loading import class_of
from spunge.model.packing import hollow
from spunge.model.refusing import refused_as
from spunge.recipe.schema import Recipe
from spunge.temporary import TemporaryFolder
from spunge.weights.checkpoint import ADAPTER, WHOLE, file_names
from spunge.weights.described import described_by

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def with_shapes(recipe: Recipe) -> Iterator[Recipe | None]:
    """The recipe of a model with a file of its shapes, for the time of the block; None where the model has weights, or is not here.

    The file takes no room: what would be values is a hole. Raises RecipeError for a configuration that no model can be built of.
    """
    folder = Path(os.path.expanduser(recipe.model.path))
    if not _unweighted(folder):
        yield None
        return
    if recipe.model.unlearning_layers is not None:
        raise RecipeError(
            f"model.unlearning_layers: {recipe.model.path!r} holds no weights to lay them beside; download the "
            "model, or leave it out"
        )
    with TemporaryFolder("shapes") as aside:
        for each in folder.iterdir():
            (aside / each.name).symlink_to(each.resolve())
        with refused_as(f"model.path: no model can be built of the configuration in {recipe.model.path!r}"):
            _write_shapes(folder, recipe.model.trust_remote_code, aside / WHOLE)
        model = recipe.model.model_copy(update={"path": str(aside)})
        try:
            yield recipe.model_copy(update={"model": model})
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(aside), recipe.model.path)) from None


def _unweighted(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    names = file_names(folder, "model.path")
    # Of a folder of folders with weights, one of these is meant, and the error that names them comes.
    return (
        ADAPTER not in names and not any(each.endswith(WEIGHTS) for each in names) and not [*folder.glob(f"*/{WHOLE}")]
    )


def _write_shapes(folder: Path, trust: bool, file: Path) -> None:
    config = described_by(folder, trust)
    dtype = config.dtype if config.dtype in CODES else torch.float32
    header, end = {}, 0
    for name, parameter in hollow(class_of(config), config, trust).named_parameters():
        start, end = end, end + parameter.numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": [*parameter.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
