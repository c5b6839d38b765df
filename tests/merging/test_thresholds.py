"""The exact threshold against plain sorting, whatever the data, the sample and the chunks."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spunge.merging import thresholds
from spunge.merging.thresholds import Bracket, guess, keys_of, rank_of, value_of

VALUES = st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=60)


def found(bracket: Bracket, values: torch.Tensor, cut: int) -> int:
    """Passes until the bracket holds one key; the stream comes in pieces of `cut`."""
    passes = 0
    while not bracket.found:
        for piece in values.split(cut):
            bracket.add(*bracket.split(keys_of(piece)))
        bracket.narrow()
        passes += 1
        assert passes < 12
    return passes


@given(VALUES, st.floats(0.01, 1), st.integers(1, 20), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_the_sorted_entry_of_its_rank(values, share, cut, sampled):
    stream = torch.tensor(values, dtype=torch.float32)
    rank = rank_of(share, stream.numel())
    bracket = guess(rank, stream.numel(), keys_of(stream)[:sampled])
    found(bracket, stream, cut)
    expected = stream.sort(descending=True).values[rank - 1]
    # A rank that takes in everything may stop at 0: both keep all.
    assert bracket.threshold == float(expected) or (rank == stream.numel() and bracket.threshold == 0)


@given(VALUES, VALUES, st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_a_misleading_sample_costs_passes_and_no_exactness(values, lie, share):
    stream = torch.tensor(values, dtype=torch.float32).repeat(61)  # more than the sample, which else would be all of it
    rank = rank_of(share, stream.numel())
    bracket = guess(rank, stream.numel(), keys_of(torch.tensor(lie, dtype=torch.float32)))
    found(bracket, stream, 100)
    assert bracket.threshold in (float(stream.sort(descending=True).values[rank - 1]), 0.0)
    assert int((stream >= bracket.threshold).sum()) >= rank


def test_zeros_that_nobody_streams_keep_everything():
    stream = torch.tensor([1.0, 2.0, 3.0])
    bracket = Bracket(rank=5, population=3)
    found(bracket, stream, 3)
    assert bracket.threshold == 0


def test_a_good_sample_needs_one_pass():
    stream = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).abs()
    bracket = guess(rank_of(0.2, 1 << 20), 1 << 20, keys_of(stream[: 1 << 17]))
    assert found(bracket, stream, 1 << 18) == 1
    assert bracket.threshold == float(stream.kthvalue((1 << 20) - int(0.2 * (1 << 20)) + 1).values)


@given(st.floats(0, 2.0**127, width=32), st.floats(0, 2.0**127, width=32))
def test_keys_are_in_the_order_of_values(a, b):
    keys = keys_of(torch.tensor([a, b]))
    assert (a < b) == bool(keys[0] < keys[1])
    assert value_of(int(keys[0])) == a


@pytest.mark.parametrize(("share", "population", "rank"), [(0.2, 10, 2), (0.2, 4, 1), (1.0, 7, 7), (0.0, 7, 0)])
def test_a_share_above_zero_keeps_at_least_one(share, population, rank):
    assert rank_of(share, population) == rank
    assert thresholds.rank_of(0.01, 10, least=0) == 0


def test_keys_too_many_to_list_are_binned_to_the_same_threshold(monkeypatch):
    stream = torch.randn(50_000, generator=torch.Generator().manual_seed(1)).abs()
    expected = float(stream.sort(descending=True).values[9_999])
    for most in (0, 100, 1 << 20):
        monkeypatch.setattr(thresholds, "LISTED", most)
        for first in (Bracket(10_000, 50_000), guess(10_000, 50_000, keys_of(stream[:500]))):
            found(first, stream, 700)
            assert first.threshold == expected


def test_of_a_chunk_a_bracket_holds_its_keys_and_not_the_chunk():
    """Twenty branches of 100 million entries otherwise lay in memory whole: 8.9 GB in place of 0.6."""
    bracket, chunk = Bracket(rank=2, population=1000), np.arange(1000, dtype=np.int32)
    gone = weakref.ref(chunk)
    bracket.add(0, torch.from_numpy(chunk[:5]))
    del chunk
    assert gone() is None
    assert bracket.listed == 5
    bracket.narrow()
    assert bracket.low == bracket.high == 3
