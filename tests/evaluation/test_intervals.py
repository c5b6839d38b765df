"""Intervals against scipy's, and how often they cover the truth."""

from math import comb

import numpy as np
import pytest
from scipy import stats

from spunge.evaluation.evaluator import Measure
from spunge.evaluation.intervals import agreeing, exact, paired, percentiles, student
from spunge.evaluation.statistics import difference, score


@pytest.mark.parametrize("count", [1, 2, 5, 17, 300])
def test_the_exact_interval_of_a_share_is_scipys(count: int) -> None:
    for successes in {0, 1, count // 3, count - 1, count}:
        expected = stats.binomtest(successes, count).proportion_ci(0.95, "exact")
        assert exact(successes, count) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_an_interval_of_a_share_covers_every_true_share_at_least_95_times_in_100() -> None:
    for count in (1, 5, 12, 40):
        ends = np.array([exact(successes, count) for successes in range(count + 1)])
        for share in np.linspace(0, 1, 201):
            covers = (ends[:, 0] <= share) & (share <= ends[:, 1])
            assert stats.binom.pmf(np.arange(count + 1), count, share)[covers].sum() >= 0.95 - 1e-9


def pairs(count: int) -> dict[tuple[int, int], tuple[float, float]]:
    """The interval for every way in which so many items rose and fell."""
    found = {}
    for rose in range(count + 1):
        for fell in range(count + 1 - rose):
            after = np.r_[np.ones(rose), np.zeros(count - rose)]
            before = np.r_[np.zeros(rose), np.ones(fell), np.zeros(count - rose - fell)]
            sides = [[Measure("accuracy", each, np.ones(count), "known")] for each in (after, before)]
            found[rose, fell] = difference(*sides, range(count))[3:5]
    return found


def chance(rose: int, fell: int, count: int, rising: float, falling: float) -> float:
    ways = comb(count, rose) * comb(count - rose, fell)
    return ways * rising**rose * falling**fell * max(0.0, 1 - rising - falling) ** (count - rose - fell)


@pytest.mark.parametrize("count", [5, 10, 15])
def test_a_difference_of_shares_covers_the_truth_and_claims_no_change_too_often(count: int) -> None:
    """For every pair of true shares on a grid, over every outcome: no draw of luck in it."""
    ends = pairs(count)
    covered = []
    for rising in np.linspace(0, 1, 11):
        for falling in np.linspace(0, 1 - rising, 11):
            ways = {each: chance(*each, count, rising, falling) for each in ends}
            hit = [each for each, (low, high) in ends.items() if low - 1e-9 <= rising - falling <= high + 1e-9]
            covered.append(sum(ways[each] for each in hit))
    assert min(covered) > 0.89
    assert np.mean(covered) > 0.95
    for share in np.linspace(0, 0.5, 26):
        claims = [each for each, (low, high) in ends.items() if low > 0 or high < 0]
        assert sum(chance(*each, count, share, share) for each in claims) <= 0.05


def test_the_score_interval_of_paired_shares_is_where_the_restricted_likelihood_says() -> None:
    """Tango's statistic with the likeliest shares found by search, which lies at the normal quantile at both ends."""
    from scipy.optimize import minimize_scalar

    rose, fell, count = 3, 12, 40
    for end, side in zip(paired(rose, fell, count), (1, -1), strict=True):

        def unlikely(falls: float, end: float = end) -> float:
            rises = falls + end
            logs = [rose * np.log(rises), fell * np.log(falls), (count - rose - fell) * np.log(1 - rises - falls)]
            return -float(sum(logs))

        falls = minimize_scalar(
            unlikely, bounds=(max(0.0, -end), (1 - end) / 2), method="bounded", options={"xatol": 1e-10}
        ).x
        z = (rose - fell - count * end) / np.sqrt(count * (2 * falls + end - end**2))
        assert z == pytest.approx(side * 1.96, abs=1e-3)


def test_a_paired_interval_reaches_no_change_where_mcnemars_exact_test_finds_none() -> None:
    for rose in range(9):
        for fell in range(9):
            low, high = paired(rose, fell, 40)
            tested = rose + fell > 0 and stats.binomtest(rose, rose + fell).pvalue < 0.05
            assert (low > 0 or high < 0) == tested


def test_what_all_items_agree_on_may_be_otherwise_in_a_share_of_them() -> None:
    assert agreeing(0.0, 5, -1.0, 1.0).high == pytest.approx(0.5218, abs=1e-4)
    assert agreeing(1.0, 5, 0.0, 1.0) == pytest.approx(exact(5, 5))
    # The rule of three: about 3 / n to one side, 3.7 / n to both.
    assert agreeing(0.0, 1000, 0.0, 1.0).high == pytest.approx(3.7 / 1000, rel=0.01)


def test_students_interval_is_scipys() -> None:
    values = np.array([0.3, 1.2, 0.7, 0.1])
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert student(values.mean(), [(stats.sem(values) ** 2, 4)]) == (
        pytest.approx(expected[0]),
        pytest.approx(expected[1]),
    )
    found = score([Measure("entropy", values, np.ones(4), None)], range(4))
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    # Of an exponent it is that of the logarithms. These may be below 0; of a perplexity see test_statistics.py.
    values -= 0.2
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    found = score([Measure("other", values, np.ones(4), "unknown", "exp")], range(4))
    assert (found.low, found.high) == (pytest.approx(np.exp(expected[0])), pytest.approx(np.exp(expected[1])))


def test_percentiles_go_further_out_where_items_are_few() -> None:
    """Of means of normal draws they are Student's interval, whose error counts n - 1."""
    for count in (10, 40, 10**6):
        spread = np.sqrt((count - 1) / count)  # of a bootstrap's means, in standard errors
        low, high = percentiles(spread * stats.norm.ppf(np.linspace(0, 1, 1_000_001)[1:-1]), count)
        assert (low, high) == (pytest.approx(-high, rel=1e-3), pytest.approx(stats.t.ppf(0.975, count - 1), rel=1e-3))


@pytest.mark.parametrize("count", [3, 5, 9, 12, 25])
def test_a_mean_ratio_of_few_items_covers_the_truth_about_95_times_in_100(count: int) -> None:
    """Losses over tokens: lengths differ, and the value is a ratio of sums."""
    generator, hits, rounds = np.random.default_rng(count), 0, 300
    for _ in range(rounds):
        tokens = generator.integers(5, 30, count).astype(float)
        losses = tokens * 2.0 + generator.normal(0, 1, count) * np.sqrt(tokens)
        found = score([Measure("perplexity", losses, tokens, "unknown", "exp")], range(count))
        hits += found.low <= np.exp(2.0) <= found.high
    # Three standard errors below 0.95, and not always: an interval of everything covers as well.
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / rounds) <= hits / rounds < 0.995
