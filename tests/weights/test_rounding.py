"""Rounding to 16 bits, against the sorted list of every number that the dtype has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import noise, write_checkpoint
from spunge.weights.checkpoint import Checkpoint
from spunge.weights.rounding import DRAW, draws, narrowed, probes, rounded, stored_dtypes

HALVES = [torch.bfloat16, torch.float16]
NUMBERS = st.floats(-60000, 60000, width=32)


def every_number(dtype):
    """All finite numbers of a 16-bit dtype, float64, sorted, 0 once."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).double()
    return bits[bits.isfinite()].unique()


def neighbours(values, dtype):
    """The largest number of the dtype that is no larger than each value, and the smallest that is no smaller."""
    known = every_number(dtype)
    above = torch.searchsorted(known, values.double())
    exact = known[above] == values.double()
    return known[torch.where(exact, above, above - 1)], known[above]


@pytest.mark.parametrize("dtype", HALVES)
@given(
    values=st.lists(NUMBERS | st.floats(-(2.0**-13), 2.0**-13, width=32), min_size=1, max_size=40),
    seed=st.text(max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_a_random_rounding_gives_one_of_the_two_neighbours(dtype, values, seed):
    given_values = torch.tensor(values, dtype=torch.float32)
    result = rounded(given_values, dtype, draws(seed, 0, len(values))).double()
    low, high = neighbours(given_values, dtype)
    assert bool(((result == low) | (result == high)).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0013, -3.3333e-3, 2.5e-6, -1.7e-7, 0.99999])
def test_a_random_rounding_goes_up_as_often_as_keeps_the_mean(dtype, value):
    count = 200_000
    values = torch.full((count,), value)
    result = rounded(values, dtype, draws("a tensor", 0, count)).double()
    low, high = (float(end[0]) for end in neighbours(values, dtype))
    share = float((result == high).double().mean())
    assert share == pytest.approx((float(values[0]) - low) / (high - low), abs=0.004)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_that_the_dtype_has_stay_as_they_are(dtype):
    known = every_number(dtype).float()
    assert torch.equal(rounded(known, dtype, draws("x", 0, len(known))).float(), known)
    assert torch.equal(rounded(known, dtype), known.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_not_finite_stays_not_finite(dtype):
    odd = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)]
    )
    assert not rounded(odd, dtype, draws("x", 0, 4)).isfinite().any()


def test_float32_takes_sums_as_they_are():
    values = noise(0, 100)
    assert torch.equal(rounded(values, torch.float32, draws("x", 0, 100)), values)


def test_draws_depend_on_the_tensor_and_the_place_alone_and_are_uniform():
    whole = draws("a", 0, 1 << 18)
    assert torch.equal(draws("a", 1000, 500), whole[1000:1500])
    other = draws("b", 0, 1 << 18)
    assert abs(float(torch.corrcoef(torch.stack([whole, other]).double())[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([whole[1:], whole[:-1]]).double())[0, 1])) < 0.01
    assert float(whole.double().mean()) == pytest.approx(2 ** (DRAW - 1), rel=0.005)
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 1 << DRAW


def base(tmp_path):
    return Checkpoint(
        write_checkpoint(
            tmp_path / "base",
            {
                "a": noise(0, 40, 16).bfloat16(),
                "router": noise(1, 8),  # kept wider than the rest
                "half": noise(2, 8).half(),
                "steps": torch.arange(4),
            },
        )
    )


@pytest.mark.parametrize(
    ("wanted", "dtypes", "fewer"),
    [
        ("base", ["bfloat16", "float32", "float16", "int64"], []),
        ("float32", ["float32", "float32", "float32", "int64"], []),
        ("bfloat16", ["bfloat16", "float32", "float16", "int64"], []),
        ("float16", ["float16", "float32", "float16", "int64"], ["a"]),
    ],
)
def test_tensors_kept_wider_than_the_rest_and_integers_keep_their_dtype(tmp_path, wanted, dtypes, fewer):
    checkpoint = base(tmp_path)
    found = stored_dtypes(checkpoint, wanted)
    assert [str(found[name]).removeprefix("torch.") for name in ("a", "router", "half", "steps")] == dtypes
    assert narrowed(checkpoint, found) == fewer


@pytest.mark.parametrize("shapes", [[(40, 16)], [(3000, 700), (1 << 20, 3), (5,), ()], [(70000, 64)], [(2, 1 << 21)]])
def test_probes_are_whole_rows_inside_each_tensor(tmp_path, shapes):
    from spunge.weights.checkpoint import TensorInfo

    infos = [TensorInfo(str(i), tmp_path, torch.bfloat16, shape, 0, 0) for i, shape in enumerate(shapes)]
    found = probes(infos)
    assert {info.name for info, _, _ in found} == {info.name for info in infos}
    looked_at = 0
    for info, start, stop in found:
        columns = info.shape[-1] if info.shape else 1
        assert 0 <= start < stop <= info.numel
        assert start % columns == 0
        assert stop % columns == 0
        looked_at += stop - start
    total = sum(info.numel for info in infos)
    assert looked_at == total if total <= 1 << 18 else looked_at <= 1 << 22
