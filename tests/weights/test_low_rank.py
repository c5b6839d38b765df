"""Entries of a LoRA difference, formed in blocks of rows."""

from itertools import pairwise

import pytest
import torch

from spunge.weights.delta import LowRank
from spunge.weights.sources import low_rank_entries

SHAPES = [(40, 7), (300, 5), (3, 40_000), (20, 140_000), (1, 9)]


def factors(rows: int, columns: int) -> LowRank:
    generator = torch.Generator().manual_seed(rows)
    return LowRank(
        torch.randn(2, columns, generator=generator).double().float(), torch.randn(rows, 2, generator=generator), 0.5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_any_entries_are_those_of_the_whole_product(shape: tuple[int, int]) -> None:
    change = factors(*shape)
    whole = (0.5 * change.B.double() @ change.A.double()).reshape(-1)
    size = whole.numel()
    for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2 + 1), (size // 2, size // 2)]:
        entries = low_rank_entries(change, start, stop)
        assert entries.shape == (stop - start,)
        assert torch.allclose(entries.double(), whole[start:stop], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_how_they_are_cut_changes_no_bit(shape: tuple[int, int]) -> None:
    change, size = factors(*shape), shape[0] * shape[1]
    at = [0, size // 7, size // 3, size // 3 + 1, size]
    cut = [low_rank_entries(change, start, stop) for start, stop in pairwise(at)]
    assert torch.equal(torch.cat(cut), low_rank_entries(change, 0, size))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_entries_keep_no_more_than_themselves(shape: tuple[int, int]) -> None:
    """As views of their blocks, the samples of a 70B-shaped matrix lay in memory as 4.6 GB."""
    assert low_rank_entries(factors(*shape), 1, 4).untyped_storage().nbytes() == 12
