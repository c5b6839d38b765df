"""Membership: scores against float64 and the model run alone, rates against scikit-learn, sets that must not be compared."""

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from spunge.data.items import read_items
from spunge.data.samples import Samples
from spunge.errors import RecipeError
from spunge.evaluation.bag_of_words import told_apart
from spunge.evaluation.detection import detected, detected_interval
from spunge.evaluation.evaluator import Bench, Limits, Measure
from spunge.evaluation.membership import MEMBERSHIP, MembershipSettings
from spunge.evaluation.membership_scores import min_k, token_facts
from spunge.evaluation.statistics import difference, recovery, score
from spunge.recipe.schema import Recipe
from toys import texts

pytest.importorskip("sklearn")
KNOWN, UNKNOWN = texts("known", 4), texts("unknown", 4)
TABLE = {"text": KNOWN + UNKNOWN, "member": [True] * 4 + [False] * 4}
ALL = ["loss", "zlib", "min_k", "min_k++", "gradient"]


def bench(folder: Path) -> Bench:
    return Bench("base", "model", folder, folder)


def scored(base: Any, table: dict[str, Any], folder: Path, **settings: Any) -> dict[str, Measure]:
    given = MembershipSettings.model_validate({"member": "m", "k": 40, "scores": ALL, "baseline": False, **settings})
    measures = MEMBERSHIP.measure(base, given, pa.table(table), bench(folder))
    return {measure.metric: measure for measure in measures}


def test_a_tokens_facts_are_its_log_probability_and_its_place_in_the_distribution() -> None:
    logits = torch.tensor(
        [[0.0, np.log(2), np.log(5)], [3.0, -1.0, -torch.inf], [100.0, 0.0, 0.0]], dtype=torch.float64
    )
    labels = torch.tensor([2, 1, 0])
    p = np.array([1 / 8, 2 / 8, 5 / 8])
    mean = (p * np.log(p)).sum()
    sigma = np.sqrt((p * (np.log(p) - mean) ** 2).sum())
    q = np.exp([3.0, -1.0]) / np.exp([3.0, -1.0]).sum()
    other = (q * np.log(q)).sum()
    spread = np.sqrt((q * (np.log(q) - other) ** 2).sum())
    facts = token_facts(logits, labels).numpy()
    np.testing.assert_allclose(facts[0], [np.log(5 / 8), (np.log(5 / 8) - mean) / sigma], rtol=1e-5)
    np.testing.assert_allclose(facts[1], [np.log(q[1]), (np.log(q[1]) - other) / spread], rtol=1e-5)
    np.testing.assert_allclose(facts[2], [0, 0], atol=1e-6)  # what is certain tells nothing
    assert token_facts(logits[:0], labels[:0]).shape == (0, 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_are_those_of_the_model_run_on_one_text_alone(
    load: Callable[..., Any], tmp_path: Path, architecture: str
) -> None:
    base = load(architecture)
    found = scored(base, TABLE, tmp_path)
    parameters = list(base.model.parameters())
    for at, text in enumerate(TABLE["text"]):
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        for each in parameters:
            each.requires_grad_(True)
        logs = base.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        own = logs.gather(1, ids[0, 1:, None])[:, 0]
        gradients = torch.autograd.grad(-own.mean(), parameters)
        for each in parameters:
            each.requires_grad_(False)
        norm = float(torch.cat([each.flatten() for each in gradients]).norm())
        logs, own = logs.detach().double().numpy(), own.detach().double().numpy()
        mean = (np.exp(logs) * logs).sum(-1)
        places = (own - mean) / np.sqrt((np.exp(logs) * logs**2).sum(-1) - mean**2)
        expected = {
            "loss": own.mean(),
            "zlib": own.mean() / len(zlib.compress(text.encode())),
            "min-40%": min_k(own, 40),
            "min-40%++": min_k(places, 40),
            "gradient norm": -norm,
        }
        for name, value in expected.items():
            assert found[f"AUROC of {name}"].numerator[at] == pytest.approx(value, rel=1e-3), name
    for measure in found.values():
        assert measure.denominator.tolist() == [1] * 4 + [0] * 4


def test_the_reference_score_is_what_another_model_finds_less_likely(
    load: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"scores": ["loss", "reference"], "reference": str(tiny("gpt2")), "reference_dtype": "float32"}
    own = scored(load(), TABLE, tmp_path, **settings)
    other = scored(load("gpt2"), TABLE, tmp_path, scores=["loss"])
    np.testing.assert_allclose(
        own["AUROC of reference"].numerator,
        own["AUROC of loss"].numerator - other["AUROC of loss"].numerator,
        rtol=1e-3,
        atol=1e-5,
    )


def test_what_ends_an_answer_changes_no_score(load: Callable[..., Any], tmp_path: Path) -> None:
    pairs = {
        "prompt": TABLE["text"],
        "completion": [f" {text}" for text in texts("answers", 8)],
        "member": TABLE["member"],
    }
    ended, bare = (
        scored(load(), {**pairs, "end": [end] * 8}, tmp_path / end, scores=["loss", "min_k"])
        for end in ("auto", "none")
    )
    for metric, measure in bare.items():
        np.testing.assert_array_equal(ended[metric].numerator, measure.numerator)


@pytest.mark.parametrize("false", [0.01, 0.1, 0.3])
def test_the_true_positive_rate_is_scikit_learns_also_with_ties_and_weights(false: float) -> None:
    from sklearn.metrics import roc_curve

    generator = np.random.default_rng(1)
    classes = (generator.random(60) < 0.5).astype(float)
    scores = np.round(generator.normal(size=60) + classes, 1)
    weights = generator.integers(0, 4, (20, 60)).astype(float)
    rates = detected(scores, classes, weights, false)
    for weight, rate in zip(weights, rates, strict=True):
        alarms, hits, _ = roc_curve(classes, scores, sample_weight=weight, drop_intermediate=False)
        assert rate == pytest.approx(hits[alarms <= false + 1e-12][-1])
    assert np.isnan(detected(scores, np.ones(60), weights, false)).all()


@pytest.mark.parametrize(("members", "others", "false"), [(30, 30, 0.1), (100, 100, 0.01), (50, 600, 0.01)])
def test_the_interval_of_the_true_positive_rate_holds_the_truth_95_times_in_100(
    members: int, others: int, false: float
) -> None:
    from scipy.stats import norm

    generator, truth, held = np.random.default_rng(0), norm.sf(norm.isf(false) - 1.5), 0
    classes = np.r_[np.ones(members), np.zeros(others)]
    for _ in range(200):
        scores = np.r_[generator.normal(1.5, 1, members), generator.normal(0, 1, others)]
        low, high = detected_interval(scores, classes, false)
        held += low <= truth <= high
    assert held >= 190


def test_too_few_non_members_bound_no_threshold() -> None:
    ranks = np.arange(900.0)[::-1]
    for others, bounded in ((100, False), (436, False), (437, True)):
        classes = np.r_[np.ones(100), np.zeros(others)]
        low, high = detected_interval(ranks[: 100 + others], classes, 0.01)
        assert (low > 0.9) is bounded
        assert high == 1


def test_a_measure_of_detection_has_that_interval_at_every_seed() -> None:
    generator = np.random.default_rng(2)
    classes = np.r_[np.ones(40), np.zeros(120)]
    seeds = [
        Measure("TPR", generator.normal(classes, 1), classes, higher="known", combine="detected", false=0.05)
        for _ in range(2)
    ]
    ends = [detected_interval(each.numerator, classes, 0.05) for each in seeds]
    found = score(seeds, range(160))
    assert (found.low, found.high) == (min(end[0] for end in ends), max(end[1] for end in ends))
    assert found.low <= found.value <= found.high


def test_a_change_of_a_rate_is_certain_only_where_both_intervals_leave_room_for_nothing_else() -> None:
    classes = np.r_[np.ones(300), np.zeros(600)]
    ranks = np.arange(900.0)
    above, below = (
        [Measure("TPR", values, classes, higher="known", combine="detected", false=0.01)] for values in (-ranks, ranks)
    )
    known, same = difference(above, below, range(900)), difference(below, below, range(900))
    assert known.value == 1
    assert known.low > 0.9
    assert not same.certain
    assert recovery(above, below, above, range(900)) is None


@pytest.mark.parametrize("apart", [True, False])
def test_a_bag_of_words_tells_sets_apart_that_differ_by_their_words(apart: bool) -> None:
    said = [f"{text} {'old' if apart and at % 2 else 'new'} tale" for at, text in enumerate(texts("any", 60))]
    classes = np.arange(60) % 2
    found = told_apart(said, classes, "")
    from sklearn.metrics import roc_auc_score

    value = roc_auc_score(classes, found)
    assert value > 0.8 if apart else 0.2 < value < 0.75
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(told_apart([said[at] for at in order], classes[order], ""), found[order])
    assert told_apart(["?!", ".", "!", "?"], np.array([0, 1, 0, 1]), "").tolist() == [0] * 4


def test_names_that_only_one_author_has_tell_nothing_where_rows_of_one_author_stay_together() -> None:
    from sklearn.metrics import roc_auc_score

    authors = np.arange(80) // 8
    said = [f"{text} Author{author}" for text, author in zip(texts("any", 80), authors, strict=True)]
    classes = authors % 2
    assert (
        roc_auc_score(classes, told_apart(said, classes, "")) > 0.8
    )  # how scikit-learn deals out the rows differs between its versions
    assert roc_auc_score(classes, told_apart(said, classes, "", authors.tolist())) < 0.75
    # A few authors of one class, many of the other: as many folds as the fewer have.
    few = np.where(authors < 2, 1, 0)
    assert np.isfinite(told_apart(said, few, "", authors.tolist())).all()


def checked(load: Callable[..., Any], table: dict[str, Any], **settings: Any) -> None:
    given = MembershipSettings.model_validate({"member": "m", **settings})
    MEMBERSHIP.check_items(given, pa.table(table), Limits(load().tokenizer, 128, 128))


def test_sets_that_words_alone_tell_apart_are_warned_of_before_training(
    load: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    said = [f"{text} {word}" for text, word in zip(texts("any", 60), ["old", "new"] * 30, strict=True)]
    with caplog.at_level(logging.WARNING, "spunge"):
        checked(load, {"text": texts("any", 60), "member": [True, False] * 30})
        assert not caplog.records
        checked(load, {"text": said, "member": [True, False] * 30})
    assert "a bag of words tells members from non-members without the model (AUROC 0.9" in caplog.text


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({**TABLE, "member": [True] * 8}, {}, "0 rows are non-members"),
        ({**TABLE, "member": [True] + [False] * 7}, {}, "1 rows are members"),
        (TABLE, {"false_positives": 0.2}, "0.2 of 4 non-members is less than one"),
        (
            {**TABLE, "text": [*KNOWN, *UNKNOWN[:3], f" {KNOWN[2]}"]},
            {},
            r"1 rows are members and non-members \(first: member row 2",
        ),
        ({**TABLE, "cluster": [*"abca", *"dddd"]}, {}, "cluster: all non-members are about 'd'"),
        ({**TABLE, "text": [*KNOWN, *UNKNOWN[:3], "paris"]}, {}, r"row 7 \(non-member\) has no token to score"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(
    load: Callable[..., Any], table: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        checked(load, table, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "non_members: give"),
        ({"member": "m", "non_members": "b.jsonl"}, "non_members: give"),
        ({"member": "m", "scores": ["reference"]}, "reference: the score"),
        ({"member": "m", "reference": "other/model"}, "reference: the score"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MembershipSettings.model_validate(settings)


def test_the_rate_is_read_at_one_percent_only_where_there_are_100_non_members(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    few = scored(load(), TABLE, tmp_path, scores=["loss"])
    many = scored(load(), {"text": texts("many", 102), "member": [True] * 2 + [False] * 100}, tmp_path, scores=["loss"])
    asked = scored(load(), TABLE, tmp_path, scores=["loss"], false_positives=0.25)
    assert [*few] == ["AUROC of loss"]
    assert [*many] == ["AUROC of loss", "TPR at 1% FPR of loss"]
    assert [*asked] == ["AUROC of loss", "TPR at 25% FPR of loss"]


def test_a_reference_that_is_the_base_itself_is_refused(toy_recipe: dict[str, Any]) -> None:
    reference = f"{toy_recipe['model']['path']}/."
    entry = {"kind": "membership", "member": "m", "scores": ["reference"], "reference": reference}
    with pytest.raises(ValueError, match="is the base itself"):
        Recipe.model_validate({**toy_recipe, "evaluate": [entry]})


def read(recipe: dict[str, Any], **settings: Any) -> Any:
    known, given = Recipe.model_validate(recipe), MembershipSettings.model_validate(settings)
    columns = MEMBERSHIP.columns(given, known.forget.columns)
    return read_items(known, given, columns, "evaluate.0", MEMBERSHIP.others(given))


def test_non_members_are_compared_with_the_members_of_every_subject(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    seen = [{"text": text, "topic": topic} for text, topic in zip(KNOWN, ["europe", "asia"] * 2, strict=True)]
    unseen = [{"text": text, "topic": "nowhere"} for text in UNKNOWN[:3]]
    recipe = {**toy_recipe, "evaluate": []}
    two = read(recipe, source=str(write_rows("a.jsonl", seen)), non_members=str(write_rows("b.jsonl", unseen)))
    both = [{**row, "seen": at < 4} for at, row in enumerate([*seen, *unseen])]
    one = read(recipe, source=str(write_rows("c.jsonl", both)), member="seen")
    for items in (one, two):
        assert items.table["text"].to_pylist() == [*KNOWN, *UNKNOWN[:3]]
        assert items.table["member"].to_pylist() == [True] * 4 + [False] * 3
        assert {name: own.tolist() for name, own in items.subjects.items()} == {
            "europe": [0, 2, 4, 5, 6],
            "asia": [1, 3, 4, 5, 6],
        }
    assert [Samples(two.table).number(at) for at in (3, 4)] == [4, 1]  # each in its own file
    with pytest.raises(RecipeError, match="row 1: 'europe' is neither true nor false"):
        read(recipe, source=str(write_rows("c.jsonl", both)), member="topic")
