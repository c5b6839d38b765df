"""Aggregates of a recipe: what they give at each stage, with intervals and paired differences, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

import spunge
from spunge.data.items import Items
from spunge.errors import RecipeError
from spunge.evaluation.benchmarks import BenchmarksSettings
from spunge.evaluation.choices import ChoicesSettings
from spunge.evaluation.evaluator import Measure
from spunge.evaluation.membership import MembershipSettings
from spunge.evaluation.memorization import MemorizationSettings
from spunge.recipe.aggregates import HarmonicMean, PrivLeak, RankTest
from spunge.recipe.evaluating import EvaluatorSettings
from spunge.recipe.loading import load_recipe
from spunge.results import Model
from spunge.run.aggregates import refuse_aggregates
from spunge.run.by_metric import Judged
from spunge.run.scoring import Scored, scored

COUNT = 40
TRUTH = {"evaluation": "forget", "metric": "truth ratio"}
MIN_K = {"evaluation": "seen", "metric": "AUROC of min-20%"}
STAGES = ["base", "reference:retrained", "control:joint", "merged"]
UTILITY = [
    {"evaluation": "facts", "metric": "answer probability"},
    {"evaluation": "facts", "metric": "ROUGE-L recall"},
    {"evaluation": "quiz", "metric": "accuracy", "subject": "world"},
]

QUIZ = {"evaluation": "choices", "metric": "accuracy"}


def ks(of: dict[str, str]) -> RankTest:
    return RankTest.model_validate({"kind": "ks", "of": of})


def mean(*of: dict[str, Any]) -> HarmonicMean:
    return HarmonicMean.model_validate({"kind": "harmonic_mean", "of": of})


def items(name: str, settings: EvaluatorSettings, count: int, **subjects: np.ndarray) -> Judged:
    members = subjects or {"all": np.arange(count)}
    table = pa.table({"prompt": ["p"] * count, "completion": ["c"] * count, "perturbed": [["w"]] * count})
    if name == "seen":
        table = pa.table({"text": ["t"] * count, "member": [True, False] * (count // 2)})
    return Judged(Items(name, settings, table, members, name * 16, None if subjects else "all"), {"by": name})


def named(settings: type[EvaluatorSettings], kind: str, name: str, **more: Any) -> EvaluatorSettings:
    return settings.model_validate({"kind": kind, "name": name, **more})


JUDGED = [
    items("facts", named(MemorizationSettings, "memorization", "facts"), 30),
    items(
        "quiz",
        named(ChoicesSettings, "choices", "quiz"),
        20,
        world=np.arange(12),
        authors=np.arange(12, 20),
    ),
    items("forget", named(MemorizationSettings, "memorization", "forget", perturbed="w"), COUNT),
    items("seen", named(MembershipSettings, "membership", "seen", member="m", scores=["min_k"], baseline=False), COUNT),
]
MODELS = [
    Model(stage="base", kind="base", name="base"),
    Model(stage="reference:retrained", kind="reference", name="retrained"),
    Model(stage="control:joint", kind="control", name="joint"),
    Model(stage="merged", kind="merged", name="merged"),
]


def stored(seed: int, shift: float) -> dict[str, list[Measure]]:
    """What a stage's evaluations gave; the larger the shift, the more the model knows."""
    generator = np.random.default_rng(seed)
    shares = np.clip(generator.random((2, 30)) * 0.5 + shift / 4, 0, 1)
    classes = np.array([1.0, 0.0] * (COUNT // 2))
    ratio = generator.normal(-shift, 1, COUNT)
    return {
        "facts": [
            Measure("answer probability", shares[0], np.ones(30), "known"),
            Measure("ROUGE-L recall", shares[1], np.ones(30), "known"),
        ],
        "quiz": [Measure("accuracy", (generator.random(20) < 0.4 + shift / 4).astype(float), np.ones(20), "known")],
        "forget": [Measure("truth ratio", ratio, np.ones(COUNT), "unknown", "exp")],
        "seen": [Measure("AUROC of min-20%", generator.normal(shift * classes), classes, "known", combine="auroc")],
    }


BASE, RETRAINED, JOINT, MERGED = stored(1, 2.0), stored(2, 0.0), stored(3, 0.5), stored(4, 0.3)
ONE_SEED = [{"base": BASE, "reference:retrained": RETRAINED, "control:joint": JOINT, "merged": MERGED}]


def made(aggregate: Any, seeds: Any = ONE_SEED) -> Scored:
    return scored(JUDGED, MODELS, seeds, [], {"it": aggregate})


def rows(found: Scored, metric: str = "it") -> dict[str, Any]:
    return {row.stage: row for row in found.rows if row.metric == metric}


def test_a_harmonic_mean_is_that_of_the_shares_with_an_interval_and_paired_differences() -> None:
    found = made(mean(*UTILITY))
    for stage, of in (("base", BASE), ("merged", MERGED)):
        shares = [measure.numerator.mean() for measure in of["facts"]] + [of["quiz"][0].numerator[:12].mean()]
        row = rows(found)[stage]
        assert row.value == pytest.approx(stats.hmean(shares))
        assert row.low < row.value < row.high
        assert (row.group, row.wanted, row.n, row.evaluation) == ("keep", "up", 42, "it")
    [pair] = [
        each for each in found.differences if each.metric == "it" and (each.stage, each.against) == ("merged", "base")
    ]
    assert pair.value == pytest.approx(rows(found)["merged"].value - rows(found)["base"].value)
    assert pair.low is not None
    assert pair.high is not None
    assert pair.low < pair.value < pair.high
    [told] = [each for each in found.evaluations if each.name == "it"]
    assert (told.kind, told.metrics, told.instrument) == (
        "harmonic_mean",
        ("it",),
        {"facts": {"by": "facts"}, "quiz": {"by": "quiz"}},
    )


def test_evaluations_are_drawn_independently_and_metrics_of_the_same_items_together() -> None:
    """The interval of three means against the closed form, by the delta method."""
    found = rows(made(mean(*UTILITY)))["base"]
    one, other = (measure.numerator for measure in BASE["facts"])
    quiz = BASE["quiz"][0].numerator[:12]
    slope = found.value**2 / 3
    facts = slope * (one / one.mean() ** 2 + other / other.mean() ** 2)
    error = np.sqrt(facts.var() / 30 + (slope * quiz / quiz.mean() ** 2).var() / 12)
    wider = stats.t.ppf(0.975, 11) * np.sqrt(12 / 11)  # of the smallest evaluation's 12 items
    assert found.high - found.low == pytest.approx(2 * wider * error, rel=0.15)


def test_a_rank_test_is_scipys_against_the_reference_and_has_its_own_scale_and_distance() -> None:
    found = made(ks(TRUTH))
    for stage, of in (("base", BASE), ("control:joint", JOINT), ("merged", MERGED)):
        expected = stats.ks_2samp(np.exp(of["forget"][0].numerator), np.exp(RETRAINED["forget"][0].numerator))
        row, log, distance = (rows(found, name)[stage] for name in ("it", "log10 of it", "it, KS distance"))
        assert row.value == pytest.approx(expected.pvalue)
        assert log.value == pytest.approx(np.log10(expected.pvalue))
        assert distance.value == pytest.approx(expected.statistic)
        assert {each.group for each in (row, log, distance)} == {"forget"}
        assert (row.wanted, log.wanted, distance.wanted) == ("up", "up", "down")
        assert log.low < log.high
    assert "reference:retrained" not in rows(found)
    assert rows(found)["base"].value < rows(found)["merged"].value
    pairs = {(each.stage, each.against) for each in found.differences if each.metric == "it"}
    assert pairs == {("control:joint", "base"), ("merged", "base"), ("merged", "control:joint")}


@pytest.mark.parametrize(("area", "sign"), [("unseen", -1), ("members", 1)])
def test_privleak_is_relative_to_the_references_area_and_counts_it_as_muse_does(area: str, sign: int) -> None:
    from sklearn.metrics import roc_auc_score

    found = rows(made(PrivLeak.model_validate({"kind": "privleak", "of": MIN_K, "area": area})))
    areas = {}
    for stage, of in (("base", BASE), ("merged", MERGED), ("retrained", RETRAINED)):
        measure = of["seen"][0]
        known = roc_auc_score(measure.denominator, measure.numerator)
        areas[stage] = known if area == "members" else 1 - known
    for stage in ("base", "merged"):
        assert found[stage].value == pytest.approx(100 * (areas[stage] / areas["retrained"] - 1))
        assert found[stage].low < found[stage].value < found[stage].high
    assert sign * found["base"].value > 50
    assert (found["base"].group, "reference:retrained" in found) == ("forget", False)
    assert (found["base"].wanted, found["base"].target) == ("near", 0.0)


def test_several_seeds_are_means_and_the_reference_is_one_for_all() -> None:
    seeds = [ONE_SEED[0], {"control:joint": stored(5, 0.5), "merged": stored(6, 0.3)}]
    found = rows(made(ks(TRUTH), seeds), "it, KS distance")
    each = [
        stats.ks_2samp(of["forget"][0].numerator, RETRAINED["forget"][0].numerator).statistic
        for of in (MERGED, seeds[1]["merged"])
    ]
    assert found["merged"].value == pytest.approx(np.mean(each))
    assert found["merged"].spread == pytest.approx(np.std(each, ddof=1))
    assert found["base"].spread is None


def test_what_has_no_spread_has_no_interval_and_what_was_not_judged_no_row() -> None:
    ones = {
        name: [Measure(each.metric, np.ones(len(each.numerator)), np.ones(len(each.numerator)), "known") for each in of]
        for name, of in BASE.items()
    }
    seeds = [{"base": ones, "merged": {"facts": MERGED["facts"]}}]
    found = rows(made(mean(*UTILITY), seeds))
    assert list(found) == ["base"]
    assert (found["base"].value, found["base"].low, found["base"].high) == (1.0, None, None)


@pytest.mark.parametrize(
    ("aggregate", "message"),
    [
        (
            ks({**TRUTH, "metric": "truth ration"}),
            r"measures no 'truth ration'; did you mean 'truth ratio'\?; it measures ROUGE",
        ),
        (ks(MIN_K), r"ks needs a metric that every item has a value of, and 'AUROC of min-20%' is none"),
        (
            PrivLeak.model_validate({"kind": "privleak", "of": TRUTH}),
            r"privleak needs an AUROC, and 'truth ratio' is none",
        ),
        (
            mean(*UTILITY, TRUTH),
            r"harmonic_mean needs shares that are higher in a better model, and 'truth ratio' is not",
        ),
        (mean(*UTILITY, MIN_K), r"harmonic_mean needs a metric that every item has a value of"),
        (
            mean(*UTILITY, {**UTILITY[2], "subject": "word"}),
            r"'quiz' has no subject 'word'; did you mean 'world'\?; it has world",
        ),
        (
            mean(*UTILITY, {**UTILITY[2], "subject": None}),
            r"'quiz' has several subjects; give subject: it has world, authors",
        ),
    ],
)
def test_what_an_evaluation_will_not_give_is_refused_before_any_training(aggregate: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^aggregates.it: .*{message}"):
        refuse_aggregates({"it": aggregate}, [each.items for each in JUDGED], STAGES)


def test_a_reference_that_the_evaluation_leaves_out_is_refused() -> None:
    settings = named(MemorizationSettings, "memorization", "forget", perturbed="w", stages=["merged"])
    with pytest.raises(
        RecipeError, match=r"^aggregates.it.against: evaluation 'forget' does not judge 'reference:retrained'"
    ):
        refuse_aggregates({"it": ks(TRUTH)}, [items("forget", settings, 4).items], STAGES)


@pytest.mark.parametrize(
    ("aggregate", "stages"),
    [
        (mean(*UTILITY), {"facts": ["merged"], "quiz": ["base", "control:*"]}),
        (ks(TRUTH), {"forget": ["reference:*"]}),
        (PrivLeak.model_validate({"kind": "privleak", "of": MIN_K}), {"seen": ["reference:retrained"]}),
    ],
)
def test_an_aggregate_that_no_stage_is_judged_for_is_refused(aggregate: Any, stages: dict[str, list[str]]) -> None:
    evaluations = [
        replace(each.items, settings=each.items.settings.model_copy(update={"stages": stages.get(each.items.name)}))
        for each in JUDGED
    ]
    with pytest.raises(RecipeError, match=r"^aggregates.it: no stage is judged by all that it is made of \("):
        refuse_aggregates({"it": aggregate}, evaluations, STAGES)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"metric": "acuracy", "subject": "world"},
            r"'tests' measured no 'acuracy'; did you mean 'accuracy'\?; it measured",
        ),
        (
            {"metric": "accuracy", "subject": "word"},
            r"'tests' has no subject 'word'; did you mean 'world'\?; it has world",
        ),
    ],
)
def test_what_only_measuring_tells_is_refused_once_it_is_measured(term: dict[str, str], message: str) -> None:
    """An evaluation of a benchmark's own questions, which names metrics and subjects itself."""
    benchmark = named(BenchmarksSettings, "lm_eval", "tests", tasks=["x"])
    judged = [JUDGED[0], Judged(Items("tests", benchmark, pa.table({}), {}, ""), {})]
    of_task = Measure("accuracy", np.ones(4), np.ones(4), "known", subject="world")
    both = mean(UTILITY[0], {"evaluation": "tests", **term})
    refuse_aggregates({"it": both}, [each.items for each in judged], STAGES)
    with pytest.raises(RecipeError, match=f"^aggregates.it: evaluation {message}"):
        scored(judged, MODELS[:1], [{"base": {**BASE, "tests": [of_task]}}], [], {"it": both})


def test_an_aggregate_without_a_value_is_remarked_on() -> None:
    """No table shows a number that is none."""
    nothing = [Measure(each.metric, each.numerator, np.zeros(30), each.higher) for each in MERGED["facts"]]
    found = made(mean(*UTILITY[:2]), [{"base": BASE, "merged": {**MERGED, "facts": nothing}}])
    [told] = [each for each in found.evaluations if each.name == "it"]
    assert told.remarks == ("It has no value at merged: what it is made of has none there.",)


def test_measures_of_another_kind_than_the_name_says_are_refused_when_they_are_there() -> None:
    other = {**MERGED, "forget": [Measure("truth ratio", np.ones(COUNT), np.ones(COUNT), "known", combine="auroc")]}
    with pytest.raises(RecipeError, match=r"aggregates.it: ks can't be made of 'truth ratio'"):
        made(ks(TRUTH), [{"merged": other}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"u": {"kind": "harmonic_mean", "of": [TRUTH, TRUTH]}}, r"aggregates.u: no evaluation is called 'forget'"),
        ({"choices": {"kind": "harmonic_mean", "of": [QUIZ, QUIZ]}}, r"aggregates: 'choices' is an evaluation's name"),
        (
            {"q": {"kind": "ks", "of": QUIZ}},
            r"aggregates.q.against: 'reference:retrained' is no reference .*; give reference",
        ),
        (
            {"q": {"kind": "ks", "of": QUIZ, "against": "base"}},
            r"aggregates.q.against: the base knows what is to be forgotten",
        ),
        ({"q": {"kind": "kss"}}, r"aggregates.q.kind: 'kss'"),
    ],
)
def test_an_aggregate_of_what_the_recipe_has_not_is_refused(
    toy_recipe: dict[str, Any], given: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**toy_recipe, "aggregates": given})


def test_a_run_gives_its_aggregates_and_makes_them_anew_alone_where_they_change(
    toy_recipe: dict[str, Any], finished: Path
) -> None:
    shares = [{"evaluation": "choices", "metric": "accuracy", "subject": topic} for topic in ("asia", "europe")]
    recipe = load_recipe({**toy_recipe, "aggregates": {"both": {"kind": "harmonic_mean", "of": shares}}})
    stamps = {file: file.read_bytes() for file in (finished / "stamps").rglob("*") if file.is_file()}
    results = spunge.run(recipe, finished)
    values = [results.value("merged", topic, "accuracy") for topic in ("asia", "europe")]
    expected = stats.hmean(values) if all(values) else 0.0
    assert results.value("merged", "all", "both") == pytest.approx(expected)
    changed = {file.name for file, before in stamps.items() if file.read_bytes() != before}
    assert {name.partition(".")[0] for name in changed} <= {"recipe", "results", "page"}
