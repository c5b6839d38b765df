"""The page's first sentence says what is certain, and no more."""

from typing import Any

import pytest

from spunge.report.headline import headline
from spunge.report.scores import arranged
from spunge.report.wording import unisolated
from spunge.results import parse_results


def said(content: dict[str, Any]) -> str:
    return unisolated(headline(arranged(parse_results(content))))


def test_what_was_forgotten_for_certain_and_what_it_cost_stand_in_one_sentence(results: Any) -> None:
    assert said(results()) == (
        "The merged model forgot both parts for certain (Europe, Asia); it got worse for certain on 1 of 3 subjects to be kept "
        "(text)."
    )


def test_nothing_is_called_forgotten_where_no_difference_is_certain(results: Any, pair: Any) -> None:
    text = said(pair(results(), spread=0.7))
    assert text.startswith("The merged model forgot none of the 2 parts for certain;")
    assert text.endswith("of what it was to keep, nothing got worse for certain.")


def test_a_part_of_which_more_is_known_for_certain_is_named(results: Any, pair: Any) -> None:
    content = results()
    for row in content["rows"]:
        if (row["stage"], row["subject"]) == ("merged", "Asia"):
            row["value"] = 1.0
    text = said(pair(content, spread=0.05))
    assert "forgot 1 of 2 parts for certain (Europe); it knows more for certain of Asia;" in text


def test_a_part_that_was_pushed_below_chance_is_named(results: Any, pair: Any) -> None:
    content = results()
    for row in content["rows"]:
        if (row["stage"], row["subject"]) == ("merged", "Asia"):
            row |= {"value": 0.1, "below_chance": True}
    assert "(Europe, Asia), Asia to below chance;" in said(pair(content))


@pytest.mark.parametrize(
    ("missing", "told"),
    [("forget", "What the merged model forgot was not measured;"), ("keep", "what it cost was not measured.")],
)
def test_what_was_not_measured_is_not_passed_over(results: Any, missing: str, told: str) -> None:
    content = results()
    forgotten = {"Europe", "Asia"}
    for key in ("rows", "differences"):
        content[key] = [row for row in content[key] if (row["subject"] in forgotten) != (missing == "forget")]
    assert told in said(content)


@pytest.mark.parametrize(
    ("spread", "told"),
    [
        (None, "forgot 1 of 1 part measured for certain (Europe)"),
        (0.7, "forgot none of the 1 part measured for certain"),
    ],
)
def test_a_part_that_was_not_measured_is_named(results: Any, pair: Any, spread: float | None, told: str) -> None:
    content = results() if spread is None else pair(results(), spread=spread)
    for key in ("rows", "differences"):
        content[key] = [row for row in content[key] if row["subject"] != "Asia"]
    assert f"{told}; Asia was not measured on both base and merged" in said(content)


def test_without_paired_differences_nothing_is_said_to_be_forgotten(results: Any) -> None:
    assert said(results() | {"differences": []}).startswith("Whether anything was forgotten cannot be said")


def fallen_from(content: dict[str, Any], before: float, after: float, subject: str = "Asia") -> dict[str, Any]:
    for row in content["rows"]:
        if row["subject"] == subject:
            row["value"] = before if row["stage"] == "base" else after
            row |= {"low": row["value"], "high": row["value"]}
    return content


@pytest.mark.parametrize(("before", "absent"), [(2e-5, True), (0.004, True), (0.006, False), (0.02, False)])
def test_a_fall_from_what_is_shown_as_nothing_is_no_forgetting(
    results: Any, pair: Any, before: float, absent: bool
) -> None:
    text = said(pair(fallen_from(results(), before, before / 2), spread=before / 4))
    assert ("forgot 1 of 2 parts for certain (Europe); of Asia the base showed nothing to forget;" in text) == absent
    assert ("forgot both parts for certain (Europe, Asia)" in text) == (not absent)


def test_where_the_base_showed_nothing_no_part_counts_as_forgotten(results: Any, pair: Any) -> None:
    content = fallen_from(fallen_from(results(), 2e-5, 1e-5), 2e-5, 1e-5, "Europe")
    text = said(pair(content, spread=1e-6))
    assert "forgot none of the 2 parts for certain; of Europe, Asia the base showed nothing to forget;" in text


def test_a_part_that_was_there_by_another_measure_is_not_called_absent(results: Any, pair: Any) -> None:
    content = results()
    other = [dict(row, metric="recall") for row in content["rows"] if row["subject"] in ("Europe", "Asia")]
    fallen_from(content, 0.0, 0.0)
    text = said(pair(content | {"rows": content["rows"] + other}))
    assert "forgot both parts for certain" in text
    assert "showed nothing" not in text


def test_where_nothing_was_judged_it_says_so(results: Any) -> None:
    assert said(results() | {"rows": [], "differences": []}).startswith("No model was judged, so what was forgotten")
