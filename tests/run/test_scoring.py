"""Measures become rows: each subject in its group, the worst beside them, attacks against what they attacked."""

import itertools
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spunge.data.items import Items
from spunge.errors import RecipeError
from spunge.evaluation.audit import AuditSettings
from spunge.evaluation.choices import ChoicesSettings
from spunge.evaluation.evaluator import Measure, Rated
from spunge.evaluation.statistics import score
from spunge.results import Higher, Model
from spunge.run.by_metric import Judged
from spunge.run.scoring import one_sided, scored

BASE = Model(stage="base", kind="base", name="base")
BRANCH = Model(stage="branch:a", kind="branch", name="a")
AUDIT = AuditSettings.model_validate({"kind": "audit", "name": "again", "attack": {"kind": "quantise"}, "of": "e"})
JOINT = Model(stage="control:joint", kind="control", name="joint")
MERGED = Model(stage="merged", kind="merged", name="merged")


def judged(name: str, subjects: dict[str, int], overall: str | None = None, settings: Any = None) -> Judged:
    """An evaluation whose subjects have so many items each, one after the other."""
    stops = np.cumsum([0, *subjects.values()])
    members = {each: np.arange(stops[at], stops[at + 1]) for at, each in enumerate(subjects)}
    if overall is not None:
        members[overall] = np.arange(stops[-1])
    settings = settings or ChoicesSettings(kind="choices", name=name)
    return Judged(Items(name, settings, pa.table({}), members, "f" * 64, overall), {"scorer": "s"})


def measure(values: list[float], metric: str = "accuracy", **facts: Any) -> Measure:
    facts = {"higher": "known", **facts}
    return Measure(metric, np.array(values, dtype=float), np.ones(len(values)), **facts)


def groups(evaluation: Judged, parts: list[str], **facts: Any) -> dict[str, tuple[str, str | None]]:
    count = max(members.max() for members in evaluation.items.subjects.values()) + 1
    measures = {evaluation.items.name: [measure([0.0, 1.0] * (count // 2) + [1.0] * (count % 2), **facts)]}
    rows = scored([evaluation], [BASE], [{"base": measures}], parts).rows
    assert {row.evaluation for row in rows} == {evaluation.items.name}
    return {row.subject: (row.group, row.worst_of) for row in rows}


@pytest.mark.parametrize(
    ("subjects", "overall", "parts", "expected"),
    [
        # Parts to forget beside others, and the subject that holds them all, whatever it is called.
        ({"a": 2, "x": 2}, "every one", ["a", "b"], {"a": "forget", "x": "keep", "every one": "together"}),
        ({"a": 2}, "all", ["a"], {"a": "forget", "all": "together"}),
        # No part among them: all rows are to be kept, even under the name `all`.
        ({"x": 2, "y": 2}, "all", ["a"], {"x": "keep", "y": "keep", "all": "keep"}),
        ({}, "all", ["a"], {"all": "keep"}),
        # A part may be called like all rows.
        ({}, "all", ["all"], {"all": "forget"}),
        # Without a split, rows that were given no name may be those to forget.
        ({}, "all", [], {"all": "together"}),
        ({}, "retain", [], {"retain": "keep"}),
    ],
)
def test_a_subjects_group_is_told_by_its_evaluation_and_the_parts(
    subjects: dict[str, int], overall: str | None, parts: list[str], expected: dict[str, str]
) -> None:
    evaluation = judged("e", subjects or {"": 4}, overall)
    items = evaluation.items
    if not subjects:
        items = Items(items.name, items.settings, items.table, {str(overall): np.arange(4)}, items.sha256, overall)
    found = groups(Judged(items, None), parts)
    assert {name: group for name, (group, _) in found.items()} == expected


def test_the_worst_subject_is_chosen_from_all_but_all_rows_and_says_of_which() -> None:
    facts: dict[str, Any] = {"worst": True, "higher": "bad"}
    every = groups(judged("e", {"a": 2, "x": 3}, "every one"), ["a"], **facts)
    assert every["worst of every one"] == ("worst", "every one")
    assert groups(judged("e", {"a": 2, "x": 3}), ["a"], **facts)["worst"] == ("worst", "all")
    assert "worst" not in groups(judged("e", {"a": 2}, "all"), ["a"], **facts)


ITEMS = {"a": [1, 1, 1, 0], "b": [1, 0, 0, 0], "x": [1, 1, 0, 0], "y": [1, 1, 1, 1]}


def ways(
    higher: Higher, parts: list[str], overall: str | None = None, settings: Any = None, **facts: Any
) -> dict[str, tuple[str | None, float]]:
    """What is wanted on each subject, and its value; items as above."""
    evaluation = judged("e", {name: len(items) for name, items in ITEMS.items()}, overall, settings)
    stored = {"e": [measure(list(itertools.chain(*ITEMS.values())), higher=higher, **facts)]}
    rows = scored([evaluation], [BASE], [{"base": stored}], parts).rows
    return {row.subject: (row.wanted, row.value) for row in rows}


def test_what_is_known_should_fall_on_parts_and_stay_on_the_rest() -> None:
    assert ways("known", ["a", "b"], "all") == {
        "a": ("down", 0.75),
        "b": ("down", 0.25),
        "x": ("up", 0.5),
        "y": ("up", 1.0),
        "all": (None, 0.625),  # what is to go and what is to stay together
    }
    assert {name: way for name, (way, _) in ways("unknown", ["a", "b"]).items()} == {
        "a": "up",
        "b": "up",
        "x": "down",
        "y": "down",
    }
    assert {way for way, _ in ways("bad", ["a"], "all").values()} == {"down"}
    assert {way for way, _ in ways("good", ["a"], "all").values()} == {"up"}
    assert {way for way, _ in ways(None, ["a"], "all").values()} == {None}


def test_what_should_be_near_a_target_is_wanted_there_on_all_rows() -> None:
    evaluation = judged("e", {"a": 4, "x": 4}, "all")
    values = {stage: {"e": [measure([0, 1] * 4, higher=None, target=0.5, worst=True)]} for stage in ("base", "merged")}
    found = scored([evaluation], [BASE, MERGED], [values], ["a"])
    assert {(row.subject, row.wanted, row.target) for row in found.rows} == {
        (name, "near", 0.5) for name in ("a", "x", "all")
    }
    assert {(row.wanted, row.target) for row in found.differences} == {("near", 0.5)}


def test_all_rows_together_are_wanted_as_the_parts_where_all_are_to_be_forgotten() -> None:
    assert ways("known", list(ITEMS), "all")["all"][0] == "down"


def test_the_worst_of_what_is_known_is_the_part_forgotten_least_and_the_rest_kept_least() -> None:
    found = ways("known", ["a", "b"], "all", worst=True)
    assert (found["least forgotten"], found["least kept"]) == (("down", 0.75), ("up", 0.5))
    found = ways("unknown", ["a", "b"], worst=True)
    assert (found["least forgotten"], found["least kept"]) == (("up", 0.25), ("down", 1.0))
    assert "least forgotten" not in ways("known", ["a"], worst=True)
    assert ways("bad", ["a", "b"], "all", worst=True)["worst"] == ("down", 1.0)
    assert ways("good", ["a", "b"], "all", worst=True)["worst"] == ("up", 0.25)


@pytest.mark.parametrize(("group", "way"), [("forget", "down"), ("keep", "up")])
def test_a_recipe_may_say_that_rows_are_to_be_forgotten_or_kept_whatever_they_are_called(group: str, way: str) -> None:
    settings = ChoicesSettings.model_validate({"kind": "choices", "name": "e", "group": group})
    evaluation, audit = judged("e", {"a": 4, "x": 4}, "all", settings), judged("again", {"a": 4, "x": 4}, "all", AUDIT)
    values = [measure([0, 1, 1, 1, 0, 0, 0, 1])]
    again = [measure([0, 1, 1, 1, 0, 0, 0, 1], "again", of="accuracy")]
    rows = scored([evaluation, audit], [BASE], [{"base": {"e": values, "again": again}}], ["a"]).rows
    assert len(rows) == 6
    assert {(row.group, row.wanted) for row in rows} == {(group, way)}


@pytest.mark.parametrize(
    ("subject", "forgotten", "parts", "overall", "expected"),
    [
        # Rows to forget are wanted down, whatever they are called, with a split and without.
        ("all", [1, 1, 1, 1], [], True, ("together", "down")),
        ("fiction", [1, 1, 1, 1], [], True, ("together", "down")),
        ("fiction", [1, 1, 1, 1], ["a"], True, ("together", "down")),
        ("fiction", [1, 1, 1, 1], ["a"], False, ("forget", "down")),
        # Others of the same source are to be kept.
        ("fiction", [0, 0, 0, 0], [], True, ("keep", "up")),
        ("fiction", [0, 0, 0, 0], ["a"], True, ("keep", "up")),
        ("all", [0, 0, 0, 0], ["a"], True, ("keep", "up")),
        # Of both, no way is good.
        ("fiction", [0, 1, 1, 1], ["a"], True, ("together", None)),
        # Where nothing tells, the name is all there is.
        ("all", None, [], True, ("together", None)),
        ("all", [0, 0, 0, 0], [], True, ("together", None)),
        ("fiction", None, [], True, ("keep", "up")),
        ("fiction", None, ["a"], True, ("keep", "up")),
    ],
)
def test_the_rows_themselves_say_whether_they_are_to_be_forgotten(
    subject: str, forgotten: list[int] | None, parts: list[str], overall: bool, expected: tuple[str, str | None]
) -> None:
    settings = ChoicesSettings.model_validate({"kind": "choices", "name": "e"})
    known = None if forgotten is None else np.array(forgotten, dtype=bool)
    whole = subject if overall else None
    items = Items("e", settings, pa.table({}), {subject: np.arange(4)}, "f" * 64, whole, known)
    rows = scored([Judged(items, None)], [BASE], [{"base": {"e": [measure([0, 1, 1, 1])]}}], parts).rows
    assert [(row.group, row.wanted) for row in rows] == [expected]


def test_a_subject_that_is_called_like_the_worst_is_refused_and_not_overwritten() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.subject: two evaluations report 'accuracy' on 'worst'"):
        groups(judged("e", {"a": 2, "worst": 2}), ["a"], worst=True, higher="bad")


def test_an_attack_is_set_against_what_it_attacked_at_the_same_stage_and_at_the_base() -> None:
    plain = judged("quiz", {"a": 8}, "all")
    settings = AuditSettings.model_validate({"kind": "audit", "attack": {"kind": "quantise"}, "of": "quiz"})
    audit = judged("audit", {"a": 8}, "all", settings)
    facts: dict[str, Any] = {
        "of": "accuracy",
        "attack": "quantise",
        "label": "rough",
        "curve": "c",
        "at": 4,
        "unit": "bits",
    }

    def stored(right: int, attacked: int) -> dict[str, list[Measure]]:
        values = [[1.0] * count + [0.0] * (8 - count) for count in (right, attacked)]
        return {"quiz": [measure(values[0])], "audit": [measure(values[1], "accuracy rough", **facts)]}

    seeds = [{"base": stored(8, 8), "branch:a": stored(8, 8), "control:joint": stored(0, 8), "merged": stored(0, 2)}]
    found = scored([plain, audit], [BASE, BRANCH, JOINT, MERGED], seeds, ["a"])
    shares = {(row.stage, row.subject): (row.of, row.value) for row in found.recovered}
    # Nothing was forgotten in the branch, so nothing comes back there.
    assert shares == {
        ("control:joint", "a"): ("accuracy", 1.0),
        ("control:joint", "all"): ("accuracy", 1.0),
        ("merged", "a"): ("accuracy", 0.25),
        ("merged", "all"): ("accuracy", 0.25),
    }
    attacked = [row for row in found.rows if row.metric == "accuracy rough"]
    assert {(row.attack, row.label, row.of, row.curve, row.at, row.unit) for row in attacked} == {
        ("quantise", "rough", "accuracy", "c", 4, "bits")
    }
    assert {row.group for row in attacked if row.subject == "all"} == {"together"}
    pairs = {(row.stage, row.against) for row in found.differences}
    assert pairs == {("branch:a", "base"), ("control:joint", "base"), ("merged", "base"), ("merged", "control:joint")}
    assert [(each.name, each.metrics, each.overall) for each in found.evaluations] == [
        ("quiz", ("accuracy",), "all"),
        ("audit", ("accuracy rough",), "all"),
    ]


def test_an_interval_that_cannot_be_had_is_left_out() -> None:
    one = [measure([2.0], "loss", higher="unknown", transform="exp")]
    found = scored([judged("e", {"a": 1})], [BASE, MERGED], [{"base": {"e": one}, "merged": {"e": one}}], ["a"])
    assert [(row.low, row.high, row.n) for row in found.rows] == [(None, None, 1)] * 2
    assert [(row.value, row.low, row.high, row.changed) for row in found.differences] == [(1.0, None, None, 0)]


def test_seeds_are_means_and_the_base_stands_in_the_first_alone() -> None:
    quiz = judged("quiz", {"a": 4})
    one, two = measure([1, 1, 0, 0]), measure([1, 0, 0, 0])
    seeds = [{"base": {"quiz": [measure([1, 1, 1, 1])]}, "merged": {"quiz": [one]}}, {"merged": {"quiz": [two]}}]
    found = scored([quiz], [BASE, MERGED], seeds, ["a"])
    base, merged = found.rows
    assert (base.value, base.spread, merged.value) == (1.0, None, 0.375)
    assert merged.spread == score([one, two], range(4)).spread == pytest.approx(np.std([0.5, 0.25], ddof=1))


def test_an_evaluation_of_some_stages_is_described_and_has_rows_there_alone() -> None:
    found = scored([judged("quiz", {"a": 4})], [BASE, MERGED], [{"merged": {"quiz": [measure([1, 1, 0, 0])]}}], ["a"])
    assert [row.stage for row in found.rows] == ["merged"]
    assert (found.differences, found.evaluations[0].metrics) == ((), ("accuracy",))
    [nowhere] = scored([judged("quiz", {"a": 4})], [BASE], [{}], ["a"]).evaluations
    assert (nowhere.metrics, nowhere.rows, nowhere.instrument) == ((), "f" * 12, {"scorer": "s"})


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ([(0.7, 0.99), (0.5, 0.6)], r"^All 8 scores lie at or above the threshold 0.5 \(0.5 to 0.99\)"),
        ([(0.01, 0.2), (0.1, 0.49)], r"^All 8 scores lie below the threshold 0.5 \(0.01 to 0.49\)"),
        ([(0.7, 0.9), (0.1, 0.2)], None),  # the merge was freed of all of it
        ([(0.2, 0.9), (0.1, 0.2)], None),
        ([], None),
    ],
)
def test_a_scorer_that_says_the_same_of_every_text_of_every_model_is_remarked_on(
    sides: list[tuple[float, float]], said: str | None
) -> None:
    rated = [Rated(0.5, least, greatest, 4) for least, greatest in sides]
    remarks = one_sided(rated)
    assert len(remarks) == (said is not None)
    assert all(re.match(said, remark) for remark in remarks if said)
    evaluation = judged("e", {"a": 2})._replace(rated=rated)
    [told] = scored([evaluation], [BASE], [{"base": {"e": [measure([0.0, 1.0])]}}], []).evaluations
    assert told.remarks == remarks
