"""The formulas of aggregates against hand cases and scipy."""

import numpy as np
import pytest
from scipy import stats

from spunge.evaluation.aggregates import harmonic_mean, ks_distance, ks_pvalue, log_pvalue, relative_leak


def test_a_harmonic_mean_is_scipys_and_none_of_nothing() -> None:
    shares = np.random.default_rng(0).random((9, 4, 2))
    np.testing.assert_allclose(harmonic_mean(list(shares)), stats.hmean(shares, axis=0))
    hand = [np.array([[value]]) for value in (0.5, 0.25, 1.0)]
    assert harmonic_mean(hand)[0, 0] == pytest.approx(3 / 7)
    assert harmonic_mean([*hand, np.zeros((1, 1))])[0, 0] == 0
    assert np.isnan(harmonic_mean([*hand, -np.ones((1, 1))])[0, 0])


@pytest.mark.parametrize("count", [1, 5, 40, 300])
def test_the_distance_and_its_p_value_are_scipys(count: int) -> None:
    generator = np.random.default_rng(count)
    for shift in (0.0, 0.3, 3.0):
        one, other = generator.normal(0, 1, count), generator.normal(shift, 1, count)
        expected = stats.ks_2samp(one, other)
        [distance] = ks_distance(one, other, np.ones((1, count)))
        assert distance == pytest.approx(expected.statistic)
        assert ks_pvalue(distance, count) == pytest.approx(expected.pvalue, rel=1e-9)
        # As TOFU's code takes the ratio the other way up: the test does not care.
        assert ks_distance(np.exp(-one), np.exp(-other), np.ones((1, count)))[0] == pytest.approx(distance)


def test_the_distance_of_drawn_items_is_scipys_of_the_items_as_often_as_they_are_drawn() -> None:
    generator = np.random.default_rng(1)
    one, other = generator.integers(0, 9, 30).astype(float), generator.integers(0, 9, 30).astype(float)
    weights = generator.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)
    for distance, drawn in zip(ks_distance(one, other, weights), weights.astype(int), strict=True):
        expected = stats.ks_2samp(np.repeat(one, drawn), np.repeat(other, drawn))
        assert distance == pytest.approx(expected.statistic)
        assert ks_pvalue(distance, 30) == pytest.approx(expected.pvalue)


def test_the_same_values_are_no_distance_apart_and_a_p_value_of_nothing_has_a_logarithm() -> None:
    values = np.array([0.1, 0.1, 0.7])
    assert ks_distance(values, values, np.ones((1, 3)))[0] == 0
    assert ks_pvalue(0.0, 3) == 1
    assert log_pvalue(np.array([1.0, 1e-20, 0.0])).tolist() == [0, -20, -300]


def test_a_leak_is_relative_to_the_references() -> None:
    assert relative_leak(np.array([[0.75, 0.25]]), np.array([[0.5]])).tolist() == [[50.0, -50.0]]
