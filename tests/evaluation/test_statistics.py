"""Intervals and differences against closed forms, and AUROC against scikit-learn."""

import numpy as np
import pytest

from spunge.evaluation.evaluator import Measure
from spunge.evaluation.statistics import auroc, difference, recovery, score, wilson, worst


def share(right: np.ndarray, **more: object) -> Measure:
    return Measure("accuracy", right.astype(float), np.ones(len(right)), "known", **more)  # type: ignore[arg-type]


def perplexity(losses: np.ndarray) -> Measure:
    return Measure("perplexity", losses, np.ones(len(losses)), "unknown", "exp")


def coins(count: int, chance: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < chance).astype(float)


def test_a_share_of_all_or_none_has_wilsons_interval_and_not_a_point() -> None:
    found = score([share(np.ones(20))], range(20))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.8389, abs=1e-4)  # 1 / (1 + 1.96^2 / 20)
    found = score([share(np.zeros(20))], range(20))
    assert (found.low, found.high) == (0.0, pytest.approx(0.1611, abs=1e-4))
    # Newcombe 1998, table I: 15 of 148.
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))


def test_a_share_that_is_none_at_every_seed_has_wilsons_interval_too() -> None:
    found = score([share(np.zeros(1), chance=0.25)] * 3, range(1))
    assert (found.low, found.below_chance) == (0.0, False)
    assert found.high == pytest.approx(0.7935, abs=1e-4)  # 1.96^2 / (1 + 1.96^2)


def test_one_item_makes_no_difference_certain() -> None:
    assert not difference([share(np.ones(1))], [share(np.zeros(1))], range(1)).certain
    assert difference([share(np.ones(2))], [share(np.zeros(2))], range(2)).certain


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
    assert (found.value, found.low, found.high, found.certain) == (0.0, 0.0, 0.0, False)
    losses = np.random.default_rng(1).normal(3, 1, 50)
    assert difference([perplexity(losses)], [perplexity(losses)], range(50))[1:5] == ("ratio", 1.0, 1.0, 1.0)


def test_exponents_are_compared_by_ratio() -> None:
    losses = np.random.default_rng(1).normal(3, 1, 500)
    found = difference([perplexity(losses + 0.5)], [perplexity(losses)], range(500))
    assert (found.kind, found.value) == ("ratio", pytest.approx(np.exp(0.5)))
    assert found.certain
    assert found.low == pytest.approx(np.exp(0.5))


def test_certain_differences_of_equal_models_come_up_about_one_time_in_twenty() -> None:
    generator, certain = np.random.default_rng(5), 0
    for _ in range(200):
        one, other = (generator.random((2, 60)) < 0.5).astype(float)
        certain += difference([share(one)], [share(other)], range(60)).certain
    assert 2 <= certain <= 24


def test_several_seeds_widen_the_interval_by_their_spread() -> None:
    steady = [share(coins(300, 0.5))] * 3
    apart = [share(coins(300, chance, 7)) for chance in (0.3, 0.5, 0.7)]
    same, varied = score(steady, range(300)), score(apart, range(300))
    assert same.spread == 0
    values = [measure.numerator.mean() for measure in apart]
    assert varied.value == pytest.approx(np.mean(values))
    assert varied.spread == pytest.approx(np.std(values, ddof=1))
    assert varied.high - varied.low > 1.5 * (same.high - same.low)


def test_below_chance_is_said_only_where_the_whole_interval_lies_below() -> None:
    assert score([share(np.r_[np.ones(10), np.zeros(190)], chance=0.25)], range(200)).below_chance is True
    assert score([share(np.r_[np.ones(45), np.zeros(155)], chance=0.25)], range(200)).below_chance is False
    assert score([share(np.ones(10))], range(10)).below_chance is None


def test_the_worst_part_is_the_highest_where_low_is_better() -> None:
    toxic = Measure("toxic", np.r_[np.zeros(50), np.ones(30), np.zeros(20)], np.ones(100), "bad")
    parts = {"a": np.arange(50), "b": np.arange(50, 100)}
    found = worst([toxic], parts, highest=True)
    assert (found.value, found.n) == (0.6, 100)
    assert found.low <= 0.6 <= found.high
    assert worst([share(toxic.numerator)], parts, highest=False).value == 0.0


def test_recovery_is_the_share_of_the_fall_that_is_undone() -> None:
    before, after = np.ones(100), np.r_[np.ones(20), np.zeros(80)]
    attacked = np.r_[np.ones(60), np.zeros(40)]
    found = recovery([share(before)], [share(after)], [share(attacked)], range(100))
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert 0.35 < found.low < 0.5 < found.high < 0.65


def test_nothing_comes_back_of_what_was_not_forgotten() -> None:
    right = coins(100, 0.5)
    assert recovery([share(right)], [share(right)], [share(np.ones(100))], range(100)) is None


def test_perplexity_recovers_on_the_scale_of_losses() -> None:
    losses = np.random.default_rng(1).normal(3, 0.5, 200)
    stages = [[perplexity(losses + more)] for more in (0.0, 2.0, 0.5)]
    found = recovery(*stages, range(200))
    assert found is not None
    assert found.value == pytest.approx(0.75)


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


def test_a_draw_without_any_token_is_left_out() -> None:
    sparse = Measure("completion perplexity", np.r_[5.0, np.zeros(9)], np.r_[2.0, np.zeros(9)], "unknown", "exp")
    found = score([sparse], range(10))
    assert found.value == pytest.approx(np.exp(2.5))
    assert np.isfinite([found.low, found.high]).all()
    nothing = Measure("completion perplexity", np.zeros(10), np.zeros(10), "unknown", "exp")
    assert np.isnan(score([nothing], range(10)).value)
