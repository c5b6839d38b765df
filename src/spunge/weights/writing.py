"""Write a safetensors file as every other file is written."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spunge.files import written


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU. Raises RecipeError when the disk is full or the folder cannot be written."""
    with written(file) as aside:
        save_file(dict(tensors), aside, metadata=metadata)
