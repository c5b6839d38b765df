"""Which of the checkpoint's tensors a parameter holds that transformers stacked on loading: the experts of a block.

transformers 5 keeps a block's experts in one parameter, (experts, d, n), and an expert's gate and up projections one above
the other in it, where checkpoints of Mixtral or Qwen3-MoE store each matrix by itself. A branch is written by the
checkpoint's names, so each matrix must be told apart. That is done by content, which does not depend on the version.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spunge.weights.checkpoint import Checkpoint

# Where in a parameter one of the checkpoint's tensors lies: its expert, and rows of the expert's matrix.
Place = tuple[int | slice, ...]


def stacked_places(model: nn.Module, checkpoint: Checkpoint) -> dict[str, dict[str, Place]]:
    """Parameters that hold many of the checkpoint's tensors: for each, those tensors and where in it they lie.

    transformers 5 stacks a block's experts, (experts, d, n), and puts an expert's gate and up projections one above the
    other, where checkpoints of Mixtral or Qwen3-MoE store each matrix by itself. The tensors are told by their first
    and last rows. A parameter of which a piece is not found is left out.
    """
    stacks = [(name, each) for name, each in model.named_parameters() if each.ndim == 3]
    stacks = [(name, each) for name, each in stacks if not _is_stored(model, name, checkpoint)]
    if not stacks:
        return {}
    by_rows = _by_edge_rows(checkpoint, stacks[0][1].dtype, {(each.shape[1], each.shape[2]) for _, each in stacks})
    found: dict[str, dict[str, Place]] = {}
    for name, parameter in stacks:
        for pieces in (1, 2):
            places = [place for expert in range(parameter.shape[0]) for place in _places(expert, parameter, pieces)]
            stored = [by_rows.get(_edge_rows(parameter[place])) for place in places]
            if None not in stored and len(set(stored)) == len(stored):
                found[name] = {key: place for key, place in zip(stored, places, strict=True) if key is not None}
                break
    return found


def _is_stored(model: nn.Module, name: str, checkpoint: Checkpoint) -> bool:
    prefix = getattr(model, "base_model_prefix", "") + "."
    return any(spelling in checkpoint.tensors for spelling in (name, name.removeprefix(prefix), prefix + name))


def _places(expert: int, stack: Tensor, pieces: int) -> list[Place]:
    """Of an expert's matrix cut into so many pieces from top to bottom."""
    height = stack.shape[1] // pieces
    return [(expert,)] if pieces == 1 else [(expert, slice(i * height, (i + 1) * height)) for i in range(pieces)]


def _edge_rows(matrix: Tensor) -> bytes:
    """What a matrix is told by: the bytes of its first and its last row."""
    return b"".join(matrix[row].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for row in (0, -1))


def _by_edge_rows(
    checkpoint: Checkpoint, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]
) -> dict[bytes, str | None]:
    """The checkpoint's matrices of the given shapes, or of their halves, by edge rows; None where two have the same."""
    wanted = {(rows // pieces, columns) for rows, columns in shapes for pieces in (1, 2)}
    found: dict[bytes, str | None] = {}
    for info in checkpoint.tensors.values():
        if info.shape in wanted:
            first, last = (checkpoint.read(info.name, slice(row, row + 1)) for row in (0, info.shape[0] - 1))
            key = _edge_rows(torch.cat([first, last]).to(dtype))
            found[key] = None if key in found else info.name
    return found
