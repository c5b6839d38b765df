"""Halves of an evaluation's items: disjoint, whole, alike in subjects."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spunge.data.halves import halved
from spunge.data.items import MEMBER, Items
from spunge.data.query import ROW
from spunge.errors import RecipeError
from spunge.evaluation.perplexity import PerplexitySettings
from spunge.recipe.loading import load_recipe
from spunge.run.inputs import BaseInputs


def halves(texts: list[str], subjects: dict[str, list[int]], members: list[bool] | None = None) -> list[list[int]]:
    """The rows' numbers in both halves."""
    table = pa.table({ROW: list(range(len(texts))), "text": texts, **({MEMBER: members} if members else {})})
    arrays = {name: np.array(own) for name, own in subjects.items()}
    overall = "all" if "all" in subjects else None
    items = Items("texts", PerplexitySettings(), table, arrays, "", overall)
    return [half.table[ROW].to_pylist() for half in halved(items, 0, "evaluate.0.half")]


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5, 4), (41, 2, 7, 10), (100,)])
def test_every_item_is_in_one_half_and_each_subject_in_both_but_for_one_item(sizes: tuple[int, ...]) -> None:
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    owner = np.random.default_rng(1).permutation(owner).tolist()
    subjects = {str(n): [i for i, own in enumerate(owner) if own == n] for n in range(len(sizes))}
    validation, test = halves([f"text {i}" for i in range(len(owner))], subjects | {"all": list(range(len(owner)))})
    assert sorted(validation + test) == list(range(len(owner)))
    counts = [Counter(owner[item] for item in half) for half in (validation, test)]
    assert all(abs(counts[0][n] - counts[1][n]) <= 1 for n in range(len(sizes)))
    assert abs(len(validation) - len(test)) <= 1


def test_members_and_non_members_are_halved_each() -> None:
    members = [True] * 7 + [False] * 9
    subjects = {"a": [0, 1, 2, *range(7, 16)], "b": [3, 4, 5, 6, *range(7, 16)]}
    validation, test = halves([f"text {i}" for i in range(16)], subjects, members)
    for kind, whole in ((range(7), 7), (range(7, 16), 9)):
        assert sorted(len(set(half) & set(kind)) for half in (validation, test)) == [whole // 2, whole - whole // 2]


def test_the_same_text_is_never_in_both_halves() -> None:
    texts = [f"text {i % 6}" for i in range(30)]
    validation, test = halves(texts, {"all": list(range(30))})
    assert not {texts[i] for i in validation} & {texts[i] for i in test}
    assert len(validation) == len(test) == 15


@pytest.mark.parametrize(
    ("texts", "subjects", "said"),
    [
        (["a", "b", "c"], {"x": [0, 1], "y": [2]}, "evaluate.0.half: 'texts' has 1 item of 'y', all in one half"),
        (["a", "a"], {"all": [0, 1]}, "evaluate.0.half: 'texts' has 2 items of 'all', all in one half"),
    ],
)
def test_a_subject_that_cannot_be_halved_is_refused(
    texts: list[str], subjects: dict[str, list[int]], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        halves(texts, subjects)


def test_the_halves_of_an_evaluation_are_its_items(
    toy_recipe: dict[str, Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source = str(write_rows("mine.jsonl", [{"text": f"text {i}", "topic": "xy"[i % 2]} for i in range(10)]))

    def items(half: str | None) -> Items:
        toy_recipe["evaluate"] = [{"kind": "perplexity", "source": source, "subject": "every", "half": half}]
        return BaseInputs(load_recipe(toy_recipe), tmp_path / "run").evaluations[0]

    whole, validation, test = items(None), items("validation"), items("test")
    texts = whole.table["text"].to_pylist()
    assert sorted(validation.table["text"].to_pylist() + test.table["text"].to_pylist()) == sorted(texts)
    for half in (validation, test):
        own = half.table["text"].to_pylist()
        assert set(half.subjects) == {"x", "y", "every"}
        for name in "xy":
            assert {own[i] for i in half.subjects[name]} == set(own) & {texts[i] for i in whole.subjects[name]}
        assert half.subjects["every"].tolist() == list(range(5))
    assert len({whole.sha256, validation.sha256, test.sha256}) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"kind": "audit", "of": "choices", "attack": "relearn"},
            "the items of 'relearn choices' are those of 'choices'",
        ),
        ({"kind": "lm_eval", "tasks": ["mmlu"]}, "'lm_eval' brings items of its own"),
    ],
)
def test_an_evaluation_without_rows_of_its_own_is_not_halved(
    toy_recipe: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    toy_recipe["evaluate"].append({**change, "half": "test"})
    with pytest.raises(RecipeError, match=f"evaluate.half: {said}"):
        load_recipe(toy_recipe)
