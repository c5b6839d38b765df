"""Texts of unequal length in one batch: which go together, and how they are laid out."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def grouped(sizes: Sequence[int], budget: int, alike: bool = False) -> Iterator[list[int]]:
    """Groups of texts, the longest first, whose padded size stays within the budget. alike: without padding."""
    rows: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if rows and ((len(rows) + 1) * sizes[rows[0]] > budget or (alike and sizes[index] != sizes[rows[0]])):
            yield rows
            rows = []
        rows.append(index)
    if rows:
        yield rows


def left_padded(coded: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(b, t) ids and mask; all prompts end in the last column."""
    width = max(map(len, coded))
    ids = torch.full((len(coded), width), pad, dtype=torch.long)
    mask = torch.zeros(len(coded), width, dtype=torch.long)
    for row, each in enumerate(coded):
        ids[row, width - len(each) :] = torch.tensor(each)
        mask[row, width - len(each) :] = 1
    return ids, mask
