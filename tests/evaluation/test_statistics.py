"""Intervals and differences against closed forms, and AUROC against scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest, t

from spunge.evaluation.evaluator import Measure
from spunge.evaluation.statistics import auroc, difference, recovery, score, worst


def share(right: np.ndarray, **more: object) -> Measure:
    return Measure("accuracy", right.astype(float), np.ones(len(right)), "known", **more)  # type: ignore[arg-type]


def perplexity(losses: np.ndarray) -> Measure:
    return Measure("perplexity", losses, np.ones(len(losses)), "unknown", "exp")


def coins(count: int, chance: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < chance).astype(float)


def test_a_share_of_all_or_none_has_an_exact_interval_and_not_a_point() -> None:
    found = score([share(np.ones(20))], range(20))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 20))
    found = score([share(np.zeros(5))], range(5))
    assert (found.low, found.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))


def test_a_share_that_is_none_at_every_seed_has_an_exact_interval_too() -> None:
    found = score([share(np.zeros(1), chance=0.25)] * 3, range(1))
    assert (found.low, found.below_chance) == (0.0, False)
    assert found.high == pytest.approx(0.975)


@pytest.mark.parametrize("samples", [1.0, 4.0])
def test_items_that_all_agree_have_an_interval_where_the_metric_has_bounds_and_none_where_it_has_not(
    samples: float,
) -> None:
    """Also a share of several samples, or one that is neither 0 nor 1."""
    weights = np.full(5, samples)
    shares = [score([Measure("m", value * weights, weights, "bad")], range(5)) for value in (0.0, 0.5, 1.0)]
    some = 1 - 0.025 ** (1 / 5)
    assert [(each.low, each.high) for each in shares] == [
        (0.0, pytest.approx(some)),
        (pytest.approx(0.5 - 0.5 * some), pytest.approx(0.5 + 0.5 * some)),
        (pytest.approx(1 - some), 1.0),
    ]
    found = score([perplexity(np.full(5, 2.0))], range(5))
    assert found.value == pytest.approx(np.exp(2.0))
    assert np.isnan([found.low, found.high]).all()


def test_the_interval_of_a_perplexity_begins_at_1_at_the_least() -> None:
    found = score([perplexity(np.array([2.0, 4.0]))], range(2))
    assert (found.low, found.high) == (1.0, pytest.approx(np.exp(stats.t.interval(0.95, 1, 3, 1)[1])))
    other = score([Measure("other", np.array([-2.0, 4.0]), np.ones(2), "unknown", "exp")], range(2))
    assert other.low < 1  # of logarithms that may be below 0


def test_items_that_agree_but_weigh_unlike_count_as_fewer() -> None:
    weights = np.array([97.0, 1.0, 1.0, 1.0])
    found = score([Measure("m", weights, weights, "known")], range(4))
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / (100**2 / (97**2 + 3)))), 1.0)


@pytest.mark.parametrize(("count", "certain"), [(1, False), (2, False), (5, False), (6, True)])
def test_items_that_all_change_make_a_difference_certain_where_a_sign_test_does(count: int, certain: bool) -> None:
    found = difference([share(np.ones(count))], [share(np.zeros(count))], range(count))
    assert (found.value, found.high, found.changed) == (1.0, 1.0, count)
    assert found.low == pytest.approx(2 * 0.025 ** (1 / count) - 1)
    assert found.certain == certain
    assert certain == (binomtest(count, count).pvalue < 0.05)


@pytest.mark.parametrize(("count", "certain"), [(2, False), (3, False), (5, False), (6, True), (12, True)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_difference_is_certain_of_fewer_items_than_a_sign_test_needs(count: int, certain: bool, seeds: int) -> None:
    """Student's t takes items for normal: of two that happen to change alike it would be certain. Nor where few of many count."""
    before, changes = np.random.default_rng(3).normal(3, 1, count), np.linspace(2.0, 2.01, count)
    means = [Measure("mean", values, np.ones(count), "known") for values in (before, before + changes)]
    pairs = [(perplexity(before), perplexity(before + changes)), (means[0], means[1])]
    beside = [
        Measure("mean", np.r_[each.numerator, np.zeros(20)], np.r_[np.ones(count), np.zeros(20)], "known")
        for each in means
    ]
    for first, second in (*pairs, (beside[0], beside[1])):
        every = range(len(first.numerator))
        down, up = (
            difference([first] * seeds, [second] * seeds, every),
            difference([second] * seeds, [first] * seeds, every),
        )
        assert (up.certain, down.certain) == (certain, certain)
        assert up.low <= up.value <= up.high
    assert certain == (binomtest(count, count).pvalue < 0.05)


def test_a_paired_difference_is_narrower_than_two_unpaired_intervals() -> None:
    before = coins(400, 0.6)
    after = before.copy()
    after[:20] = 1 - after[:20]
    found = difference([share(after)], [share(before)], range(400))
    gap = after - before
    assert found.value == pytest.approx(gap.mean())
    half = 1.96 * gap.std() / np.sqrt(400)
    assert (found.low, found.high) == (
        pytest.approx(gap.mean() - half, abs=0.006),
        pytest.approx(gap.mean() + half, abs=0.006),
    )


def test_the_same_model_differs_by_nothing() -> None:
    right = coins(50, 0.5)
    found = difference([share(right)], [share(right)], range(50))
    some = 1 - 0.025 ** (1 / 50)  # of the items may change, for all that is known
    assert (found.value, found.changed, found.certain) == (0.0, 0, False)
    assert (found.low, found.high) == (pytest.approx(-some), pytest.approx(some))
    losses = np.random.default_rng(1).normal(3, 1, 50)
    found = difference([perplexity(losses)], [perplexity(losses)], range(50))
    assert (found.kind, found.value, found.changed, found.certain) == ("ratio", 1.0, 0, False)
    assert np.isnan([found.low, found.high]).all()  # nothing bounds how far a perplexity may move


def test_exponents_are_compared_by_ratio() -> None:
    losses = np.random.default_rng(1).normal(3, 1, 500)
    moved = losses + np.random.default_rng(2).normal(0.5, 0.1, 500)
    found = difference([perplexity(moved)], [perplexity(losses)], range(500))
    mean = (moved - losses).mean()
    assert (found.kind, found.value, found.changed) == ("ratio", pytest.approx(np.exp(mean)), 500)
    assert found.certain
    assert np.log(found.low) == pytest.approx(mean - 1.96 * 0.1 / np.sqrt(500), abs=2e-3)


def test_certain_differences_of_equal_models_come_up_at_most_one_time_in_twenty() -> None:
    generator, certain = np.random.default_rng(5), 0
    for _ in range(200):
        one, other = (generator.random((2, 60)) < 0.5).astype(float)
        certain += difference([share(one)], [share(other)], range(60)).certain
    assert 0 < certain <= 20


def test_several_seeds_widen_the_interval_by_their_spread() -> None:
    steady = [share(coins(300, 0.5))] * 3
    apart = [share(coins(300, chance, 7)) for chance in (0.3, 0.5, 0.7)]
    same, varied = score(steady, range(300)), score(apart, range(300))
    assert same.spread == 0
    values = [measure.numerator.mean() for measure in apart]
    assert varied.value == pytest.approx(np.mean(values))
    assert varied.spread == pytest.approx(np.std(values, ddof=1))
    assert varied.high - varied.low > 1.5 * (same.high - same.low)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_cover_the_truth_as_often_as_is_said(seeds: int) -> None:
    """Seeds that differ much more than the items of each: a bootstrap over three of them covered it 7 times in 10."""
    generator, covered = np.random.default_rng(seeds), [0, 0]
    for _ in range(400):
        skill = generator.normal(0, 0.1, (2, seeds))  # of two stages
        one, other = (
            [share(np.clip(0.5 + each + generator.normal(0, 0.1, 40), 0, 1)) for each in row] for row in skill
        )
        alone, against = score(one, range(40)), difference(one, other, range(40))
        covered[0] += alone.low <= 0.5 <= alone.high
        covered[1] += against.low <= 0 <= against.high
    assert all(0.92 <= count / 400 <= 0.98 for count in covered), covered


@pytest.mark.parametrize(("items", "seeds"), [(20, 3), (5, 3), (5, 12)])
def test_an_interval_of_seeds_alone_is_students_t_of_them(items: int, seeds: int) -> None:
    """Items that all agree within a seed: what is left is the sample of seeds."""
    values = [0.2, 0.3, 0.45, *np.linspace(0.2, 0.5, 9)][:seeds]
    found = score([share(np.full(items, value)) for value in values], range(items))
    expected = stats.t.interval(0.95, seeds - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(max(0.0, expected[0])), pytest.approx(expected[1]))


def test_below_chance_is_said_only_where_the_whole_interval_lies_below() -> None:
    assert score([share(np.r_[np.ones(10), np.zeros(190)], chance=0.25)], range(200)).below_chance is True
    assert score([share(np.r_[np.ones(45), np.zeros(155)], chance=0.25)], range(200)).below_chance is False
    assert score([share(np.ones(10))], range(10)).below_chance is None


def test_the_worst_part_is_the_highest_where_low_is_better() -> None:
    toxic = Measure("toxic", np.r_[np.zeros(50), np.ones(30), np.zeros(20)], np.ones(100), "bad")
    parts = {"a": np.arange(50), "b": np.arange(50, 100)}
    found = worst([toxic], parts, highest=True)
    assert (found.value, found.n) == (0.6, 100)
    # Either part may be the worst: the far end of the worse one, and the near end with half the tail.
    expected = binomtest(30, 50).proportion_ci(0.95).high, binomtest(30, 50).proportion_ci(0.975).low
    assert (found.high, found.low) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert worst([share(toxic.numerator)], parts, highest=False).value == 0.0


def test_the_worst_of_parts_that_all_agree_is_no_point() -> None:
    parts = {"a": np.arange(5), "b": np.arange(5, 10)}
    found = worst([share(np.ones(10))], parts, highest=True)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx((0.05 / 4) ** (1 / 5))
    found = worst([share(np.zeros(10))], parts, highest=True)
    assert (found.low, found.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))


def test_recovery_is_the_share_of_the_fall_that_is_undone() -> None:
    before, after = np.ones(100), np.r_[np.ones(20), np.zeros(80)]
    attacked = np.r_[np.ones(60), np.zeros(40)]
    found = recovery([share(before)], [share(after)], [share(attacked)], range(100))
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert 0.35 < found.low < 0.5 < found.high < 0.65


def test_all_or_nothing_that_comes_back_has_the_interval_of_the_items_that_had_fallen() -> None:
    before, after = np.ones(20), np.r_[np.zeros(8), np.ones(12)]
    whole = recovery([share(before)], [share(after)], [share(before)], range(20))
    none = recovery([share(before)], [share(after)], [share(after)], range(20))
    assert whole is not None
    assert none is not None
    assert (whole.value, whole.low, whole.high) == (1.0, pytest.approx(0.025 ** (1 / 8)), 1.0)
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 8)))


def test_nothing_comes_back_of_what_was_not_forgotten() -> None:
    right = coins(100, 0.5)
    assert recovery([share(right)], [share(right)], [share(np.ones(100))], range(100)) is None


def test_perplexity_recovers_on_the_scale_of_losses() -> None:
    losses = np.random.default_rng(1).normal(3, 0.5, 200)
    noise = np.random.default_rng(2).normal(0, 0.1, 200)
    stages = [[perplexity(losses + more)] for more in (0.0, 2.0 + noise, 0.5 - noise)]
    found = recovery(*stages, range(200))
    assert found is not None
    assert found.value == pytest.approx((1.5 + 2 * noise.mean()) / (2.0 + noise.mean()))
    assert found.low < found.value < found.high


def test_auroc_is_scikit_learns_also_with_ties_and_weights() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(3)
    scores, classes = generator.integers(0, 6, 40).astype(float), generator.integers(0, 2, 40)
    weights = generator.integers(0, 4, (5, 40)).astype(float)
    expected = [roc_auc_score(classes, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auroc(scores, classes, weights), expected)
    assert np.isnan(auroc(scores, np.ones(40), weights)).all()


def test_a_measure_of_auroc_is_scored_as_one() -> None:
    scores, classes = np.r_[np.arange(50.0), np.arange(25.0, 75.0)], np.r_[np.zeros(50), np.ones(50)]
    found = score([Measure("min-k", scores, classes, "known", combine="auroc", chance=0.5)], range(100))
    assert found.value == pytest.approx(auroc(scores, classes, np.ones((1, 100)))[0])
    assert found.low < found.value < found.high


def test_an_auroc_of_one_is_no_point_and_one_of_few_rows_has_delongs_error() -> None:
    """Of pairs that share no row, min(n, m) were all in order."""
    perfect = Measure(
        "min-k", np.r_[np.arange(5.0), np.arange(5.0, 25.0)], np.r_[np.zeros(5), np.ones(20)], "known", combine="auroc"
    )
    found = score([perfect], range(25))
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(0.025 ** (1 / 5)), 1.0)
    known, others = np.array([0.3, 0.9, 1.2, 2.0]), np.array([0.1, 0.5, 0.6, 1.5, 1.6, 1.7, 1.8, 0.2])
    few = Measure("min-k", np.r_[known, others], np.r_[np.ones(4), np.zeros(8)], "known", combine="auroc")
    sides = (known[:, None] > others).mean(axis=1), (known[:, None] > others).mean(axis=0)
    error = np.sqrt(sum(side.var(ddof=1) / len(side) for side in sides))
    found = score([few], range(12))
    half = t.ppf(0.975, 3) * error
    assert found.value == pytest.approx(sides[0].mean())
    assert (found.low, found.high) == (max(0, found.value - half), min(1, found.value + half))


def test_a_draw_without_any_token_is_left_out() -> None:
    sparse = Measure("completion perplexity", np.r_[5.0, np.zeros(9)], np.r_[2.0, np.zeros(9)], "unknown", "exp")
    found = score([sparse], range(10))
    assert found.value == pytest.approx(np.exp(2.5))
    assert np.isnan([found.low, found.high]).all()  # of one item that counts
    nothing = Measure("completion perplexity", np.zeros(10), np.zeros(10), "unknown", "exp")
    assert np.isnan(score([nothing], range(10)).value)
