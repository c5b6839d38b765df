"""leak@k: its estimator against brute force and in expectation, and what counts as a leak."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import spunge
from spunge.errors import RecipeError
from spunge.evaluation import leakage
from spunge.evaluation.evaluator import Bench, Limits
from spunge.evaluation.leakage import LEAKAGE, LeakageSettings, leak_at
from spunge.recipe.explanation import validated
from spunge.recipe.loading import load_recipe
from toys import rows

SAMPLED = {"samples": 4, "temperature": 1.0}


@pytest.mark.parametrize(("k", "count"), [(1, 1), (1, 5), (2, 5), (5, 5), (4, 16), (16, 16)])
def test_leak_at_k_is_the_share_of_draws_of_k_answers_that_hold_a_leak(k: int, count: int) -> None:
    for leaking in range(count + 1):
        if comb(count, k) <= 2000:
            answers = [True] * leaking + [False] * (count - leaking)
            draws = [any(draw) for draw in combinations(answers, k)]
            assert leak_at(k, count, leaking) == pytest.approx(np.mean(draws), abs=1e-15)
    assert leak_at(k, count, 0) == 0
    assert leak_at(k, count, count) == 1


@pytest.mark.parametrize("chance", [Fraction(1, 10), Fraction(1, 2)])
def test_leak_at_k_is_right_on_average_where_one_minus_the_plain_power_is_not(chance: Fraction) -> None:
    """E over c ~ Binomial(n, p) is 1 - (1 - p)^k, for every k <= n."""
    count = 8
    odds = [comb(count, c) * chance**c * (1 - chance) ** (count - c) for c in range(count + 1)]
    for k in (1, 4, 8):
        truth = float(1 - (1 - chance) ** k)
        assert sum(float(p) * leak_at(k, count, c) for c, p in enumerate(odds)) == pytest.approx(truth, abs=1e-12)
        plugged = sum(float(p) * (1 - (1 - c / count) ** k) for c, p in enumerate(odds))
        assert (abs(plugged - truth) > 1e-3) == (k > 1)


@pytest.fixture
def measured(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, list[float]]]:
    def measure(written: Sequence[Sequence[str]], answers: Sequence[Any], **changes: Any) -> dict[str, list[float]]:
        monkeypatch.setattr(leakage, "completions", lambda *_: written)
        generation = {"samples": len(written[0]), "temperature": 1.0}
        settings = LeakageSettings(**{"generation": generation, "k": [1, 2], **changes})
        items = pa.table({"prompt": ["who?"] * len(written), "reference": answers})
        LEAKAGE.check_items(settings, items, Limits(None, 0, None))
        measures = LEAKAGE.measure(load(), settings, items, Bench("base", "model", tmp_path, tmp_path))
        return {each.metric: (each.numerator / each.denominator).tolist() for each in measures}

    return measure


def test_an_answer_that_stands_in_a_sampled_one_is_a_leak(measured: Callable[..., dict[str, list[float]]]) -> None:
    written = [["It was PARIS.", "Rome", "", "Parisians"], ["n.y.", "", "...", ""], ["oslo", "oslo", "oslo", "oslo"]]
    answers = [["Paris"], ["New York", "N.Y"], ["Bergen"]]
    found = measured(written, answers, leaks="contains")
    # 1 of 4 leaks: 1/4, and 3 of the 6 pairs.
    assert found == {"leak@1": [0.25, 0.25, 0], "leak@2": [0.5, 0.5, 0], "empty": [0.25, 0.75, 0]}


def test_by_rouge_an_answer_leaks_from_a_recall_on(measured: Callable[..., dict[str, list[float]]]) -> None:
    pytest.importorskip("rouge_score")
    answer = "the red house by the river"  # six words
    written = [["the house by a river", "river the by house", "the", answer]]  # subsequences of 4, 2, 1 and 6 of them
    for threshold, leaks in ((0.1, 4), (0.3, 3), (0.6, 2), (0.7, 1), (1.0, 1)):
        assert measured(written, [answer], threshold=threshold)["leak@1"] == [leaks / 4]
    assert measured([["дом у реки", "река"]], ["дом у реки"], words="unicode")["leak@1"] == [0.5]


def test_a_scorer_may_say_what_leaks(measured: Callable[..., dict[str, list[float]]]) -> None:
    scorer = {"kind": "keywords", "words": ["seine", "paris"]}
    found = measured([["On the Seine", "no"], ["no", ""]], ["x", "y"], leaks="scorer", scorer=scorer)
    assert found["leak@1"] == [0.5, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [1, 32]}, r"k: 32 answers of 16 that are sampled; raise generation\.samples"),
        ({"k": [0]}, r"^k\.0: 0: "),
        ({"k": []}, r"^k: \[\]: "),
        ({"leaks": "scorer"}, r"scorer: leaks: scorer and a scorer go together"),
        ({"scorer": "keywords"}, r"scorer: leaks: scorer and a scorer go together"),
        ({"threshold": 0}, r"^threshold: 0: "),
        ({"generation": {"samples": 16}}, r"generation.*samples: greedy decoding gives the same"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validated(LeakageSettings, changes)


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], write_rows: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    def build(answers: Sequence[Any], **changes: Any) -> dict[str, Any]:
        questions = [
            {**row, "prompt": row.pop("text"), "answer": answer}
            for row, answer in zip(rows(["europe", "asia"], len(answers) // 2), answers, strict=True)
        ]
        entry = {"kind": "leakage", "source": str(write_rows("questions.jsonl", questions)), "k": [1, 4], "by": "topic"}
        entry |= {"generation": {"max_new_tokens": 4, **SAMPLED}, "leaks": "contains", **changes}
        return {**toy_recipe, "evaluate": [entry], "controls": []}

    return build


@pytest.mark.parametrize(
    ("answers", "changes", "message"),
    [
        (["a", "...", "b", "c"], {}, r"^evaluate\.answer: row 2 has an answer without a letter"),
        (["a", "", "b", "c"], {}, r"evaluate\.0\.reference: 'answer' is empty in 1 of 4 rows"),
        (
            [1, 2, 3, 4],
            {},
            r"evaluate\.0\.reference: 'answer' holds BIGINT|evaluate\.0\.reference: 'answer' holds int64",
        ),
        ([["a"], [], ["b"], ["c"]], {}, r"row 2 has an answer without a letter"),
        (
            ["uni", "ж", "b", "c"],
            {"leaks": "rouge"},
            r"^evaluate\.answer: row 2 has no word for ROUGE; set words to unicode",
        ),
        (["a", "b", "c", "d"], {"answer": "anwser"}, r"anwser"),
    ],
)
def test_answers_that_cannot_be_looked_for_are_told_before_anything_is_trained(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, answers: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        spunge.run(load_recipe(recipe(answers, **changes)), tmp_path / "run")
    assert not (tmp_path / "run" / "branches").exists()


def test_a_run_tells_the_leaks_of_each_part_with_intervals(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = recipe([["s", "e"], ["a"], ["b", "c"], ["d", "r"]], stages=["base", "merged"])
    results = spunge.run(load_recipe(given), tmp_path / "run")
    found = {(row.subject, row.metric): row for row in results.rows if row.stage == "merged"}
    for part in ("asia", "europe"):
        one, four = found[part, "leak@1"], found[part, "leak@4"]
        assert 0 <= one.low <= one.value <= four.value <= four.high <= 1
        assert (one.n, one.group) == (2, "forget")
    assert {row.metric for row in results.differences} == {"leak@1", "leak@4", "empty"}
    assert results.evaluations[0].instrument["leaks"] == "contains"
