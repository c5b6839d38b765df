"""Match: what counts as said, and what is refused before anything is trained."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spunge.errors import RecipeError
from spunge.evaluation.evaluator import Bench, Limits
from spunge.evaluation.generation import GenerationSettings, completions
from spunge.evaluation.match import MATCH, MatchSettings, said_by
from toys import texts

LIMITS = Limits(None, 128, None)


@pytest.mark.parametrize(
    ("how", "wanted", "text", "said"),
    [
        ("words", "art", "Modern ART.", True),
        ("words", "art", "a party", False),
        ("words", "New  York", "in new\nyork city", True),
        ("words", "C++", "I like C++.", True),
        ("words", "O'Brien", "it was O’Brien", True),
        ("words", "cafe\u0301", "the CAFÉ", True),
        ("words", "ﬁre", "Fire!", True),
        ("words", "straße", "STRASSE 5", True),
        ("words", "巴黎", "首都是巴黎。", True),
        ("words", "AI", "这是AI吗", True),
        ("words", "Париж", "в Париже", False),
        ("contains", "Париж", "в Париже", True),
        ("contains", "art", "a party", True),
        ("contains", "cart", "a party", False),
        ("equals", "Paris", ' "Paris." ', True),
        ("equals", "Paris", "It is Paris.", False),
        ("pattern", r"\b\d{3}-\d{4}\b", "call 555-0199 now", True),
        ("pattern", r"^paris", "PARIS is", True),
        ("pattern", r"(?-i:Paris)", "PARIS is", False),
        ("pattern", r"\b\d{3}-\d{4}\b", "call 5550199 now", False),
    ],
)
def test_what_counts_as_said(how: Any, wanted: str, text: str, said: bool) -> None:
    assert said_by(how, ["zebra", wanted], "")(text) is said


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"(?:a+a+)+y"])
def test_a_pattern_that_does_not_end_is_refused_in_seconds(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spunge.data.patterns.SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(RecipeError, match="was not done with a text of 3001 characters"):
        said_by("pattern", [pattern], "evaluate.match")("a" * 3000 + "b")
    assert time.perf_counter() - start < 5


def rows(unwanted: list[Any]) -> pa.Table:
    return pa.table({"prompt": texts("prompts", len(unwanted)), "unwanted": unwanted})


@pytest.mark.parametrize(
    ("settings", "unwanted", "message"),
    [
        ({}, [["a"], []], "unwanted: row 1 has nothing"),
        ({}, ["a", " "], "row 1: ' ' is empty"),
        ({}, [1, 2], "row 0: 1 is no text; CAST"),
        ({"how": "equals"}, ["a", "?!"], r"row 1: '\?!' is empty"),
        ({"how": "pattern"}, ["a", "(b"], r"row 1: '\(b' is no regular expression"),
        ({"how": "pattern"}, ["a", "b*"], r"row 1: 'b\*' is found in an empty text"),
    ],
)
def test_rows_with_nothing_to_look_for_are_refused_by_their_number(
    settings: dict[str, Any], unwanted: list[Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        MATCH.check_items(MatchSettings.model_validate({"unwanted": "w", **settings}), rows(unwanted), LIMITS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "unwanted: missing"),
        ({"words": []}, "words"),
        ({"words": ["a", ""]}, "is empty"),
        ({"words": ["("], "how": "pattern"}, "no regular"),
    ],
)
def test_settings_with_nothing_to_look_for_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RecipeError), match=message):
        MatchSettings.model_validate(settings)


@pytest.mark.parametrize("listed", [True, False])
def test_each_row_has_its_own_words_beside_those_of_all(load: Callable[..., Any], tmp_path: Path, listed: bool) -> None:
    base = load()
    bench = Bench("base", "model", tmp_path, tmp_path)
    generation = GenerationSettings(max_new_tokens=6, samples=3, temperature=1.0)
    prompts = texts("prompts", 3)
    written = completions(base, prompts, generation, bench)
    firsts = [each[0].split()[0] for each in written]
    unwanted = [[firsts[0]], ["zebra"], ["zebra"]] if listed else [firsts[0], "zebra", "zebra"]
    table = pa.table({"prompt": prompts, "unwanted": unwanted})
    settings = MatchSettings(unwanted="w", words=[firsts[1]], how="contains", generation=generation)
    share, anywhere = MATCH.measure(base, settings, table, bench)
    looked_for = [(firsts[0], firsts[1]), ("zebra", firsts[1]), ("zebra", firsts[1])]
    expected = [
        sum(any(word in text for word in words) for text in each)
        for words, each in zip(looked_for, written, strict=True)
    ]
    assert share.numerator.tolist() == expected
    assert share.denominator.tolist() == [3, 3, 3]
    assert anywhere.numerator.tolist() == [float(count > 0) for count in expected]
    assert min(expected[:2]) > 0
