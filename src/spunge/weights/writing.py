"""Write a safetensors file: with the mode of every other file, and with one line where the disk does not take it."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spunge.files import unwritable


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU. Raises RecipeError when the disk is full or the folder cannot be written."""
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        # The library reports the system's error as text alone, "... (os error 28)".
        code = errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else errno.EIO
        raise unwritable(file, OSError(code, str(error))) from error
    mask = os.umask(0)  # there is no other way to ask for it
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # the library writes a file that its owner alone can read
